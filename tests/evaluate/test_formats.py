"""Reports as CSV, LaTeX and Markdown: whole, escaped, with their provenance."""

import csv
import io
import re

import pytest
from runs import NASTY, columns_for, rows_of, write_default_run, write_run

from vit_reciprocam.evaluate.metrics.registry import METRICS
from vit_reciprocam.evaluate.report import formats, sheets
from vit_reciprocam.evaluate.report import write as report
from vit_reciprocam.evaluate.report.tables import read_tables


@pytest.fixture
def run(tmp_path):
    return write_default_run(tmp_path / "run")


def test_csv_reads_back_as_the_figures(run):
    tables = read_tables([run], resamples=20)
    read = list(csv.DictReader(io.StringIO(formats.figures_csv(tables))))
    assert len(read) == 4
    for line in read:
        row = rows_of(tables[0])[line["method"]]
        assert line["null_baseline"] == str(row.method == "center").lower()
        assert (line["protocol"], line["weights"]) == ("byun2023", "w" * 64)
        assert line["versions"] == "vit-reciprocam=0.1.0 numpy=2"
        for kind, estimates in (("", row.figures), ("_difference", row.differences)):
            for name in METRICS:
                text = [line.get(f"{name}{kind}{end}", "") for end in ("", "_low", "_high")]
                one = estimates.get(name)
                expected = (one.value, one.low, one.high) if one else None
                assert (tuple(map(float, text)) if any(text) else None) == expected
    read = list(csv.DictReader(io.StringIO(formats.ablation_csv(tables))))
    assert [line["setting"] for line in read] == ["kernel", "class_token"]
    for line in read:
        change = float(line["adcc"]) - float(line["adcc_reference"])
        assert float(line["adcc_difference"]) == pytest.approx(change)


def test_numbers():
    assert sheets.number(-0.001, False) == sheets.number(-0.004, True) == "0.00"
    assert sheets.number(-1.239, True) == "−1.24"
    assert sheets.number(2, True) == "+2.00"


def test_latex_is_balanced_and_escaped(tmp_path):
    columns = columns_for("reciprocam", "reciprocam:class_token=false", "center")
    path = write_run(tmp_path / "run", columns, model=NASTY, data="a\n\\end{document}%")
    (table,) = read_tables([path], resamples=5)
    content = report.make_report([table])
    for name in ("table1.tex", "ablation.tex"):
        lines = content[name].decode().splitlines()
        assert lines[1].startswith("\\providecommand")
        text = "\n".join(line for line in lines[2:] if not line.startswith("%"))
        assert "\\end{document}" not in text
        bare = re.sub(r"\\[{}&%$#_\\]", "", text)  # what is left of these means something
        assert not re.search(r"[#~_^]", bare.replace("$-$", ""))
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        assert text.count("\\begin{") == text.count("\\end{")
        for line in text.splitlines():
            if line.endswith(r"\\") and "multicolumn" not in line:
                assert len(re.findall(r"(?<!\\)&", line)) == 5
            assert not re.search(r"(?<!\\)%(?!$)", line)
    assert r"my\_50\%\&\#\$\textasciitilde{}\textasciicircum{}\textbackslash{}\{model\}" in text
    assert "w" * 64 in content["table1.tex"].decode()


def test_markdown_has_whole_rows_and_its_provenance(tmp_path):
    path = write_run(tmp_path / "run", columns_for("reciprocam", "center"), model=NASTY)
    (table,) = read_tables([path], resamples=5)
    text = report.make_report([table])["table1.md"].decode()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert "| Method | Drop ↓ | Inc ↑ | Coher ↑ | Compl ↓ | ADCC ↑ |" in lines
    assert r"\<script\>" in text
    assert "<script>" not in text.replace(r"\<script\>", "")
    for words in (
        "Protocol byun2023",
        "(weights wwwwwwwwwwww)",
        "(digest dddddddddddd)",
        "numpy 2",
    ):
        assert text.count(words) == 2 + (words == "Protocol byun2023")
