"""Data sets in every layout, and what is wrong with them said."""

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from vit_reciprocam.errors import ImageError, InputError, UnknownClassError
from vit_reciprocam.evaluate.data.datasets import Labels, check_dataset, read_dataset
from vit_reciprocam.pictures.scenes import CLASSES, draw_scene

IMAGENET = Labels(1000)
PETS = Labels(3, ("cat", "dog, domestic dog", "fish"))
TENCH, GOLDFISH = "n01440764", "n01443537"  # classes 0 and 1


def picture(path, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def labels_of(dataset):
    return [item.label for item in dataset.items]


@pytest.mark.parametrize(
    ("labels", "folders", "found"),
    [
        (IMAGENET, [GOLDFISH, TENCH], [0, 1]),
        (IMAGENET, ["7", "12"], [12, 7]),
        (PETS, ["Cat", "domestic dog"], [0, 1]),
    ],
)
def test_class_folders(tmp_path, labels, folders, found):
    for folder in folders:
        picture(tmp_path / folder / "a.png")
    dataset = read_dataset(str(tmp_path), labels)
    assert labels_of(dataset) == found
    assert [item.index for item in dataset.items] == [0, 1]


def test_a_listing_with_boxes_and_masks(tmp_path):
    picture(tmp_path / "a.png")
    mask = np.zeros((10, 20), np.uint8)
    mask[2:5, 3:9] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "list.csv").write_text(
        "image,label,boxes,mask\n"
        'a.png,dog,"[[1, 2, 3, 4], [15, 0, 19, 9]]",\n'
        "a.png,2,,mask.png\n"
        "a.png,,,\n"
    )
    boxed, masked, bare = read_dataset(str(tmp_path / "list.csv"), PETS).items
    assert (boxed.label, masked.label, bare.label) == (1, 2, None)
    drawn = np.asarray(boxed.read_objects((20, 10))) > 0
    assert drawn.sum() == 3 * 3 + 5 * 10  # both corners belong to a box
    assert drawn[2:5, 1:4].all()
    assert np.array_equal(np.asarray(masked.read_objects((20, 10))) > 0, mask > 0)
    assert bare.read_objects((20, 10)) is None


def test_a_parquet_listing_equals_its_csv(tmp_path):
    picture(tmp_path / "a.png")
    rows = {"image": ["a.png"], "synset": [GOLDFISH], "xmin": [1], "ymin": [2], "xmax": [3]}
    rows["ymax"] = [4]
    parquet.write_table(pyarrow.table(rows), tmp_path / "labels.parquet")
    (tmp_path / "rows.csv").write_text(
        f"image,synset,xmin,ymin,xmax,ymax\na.png,{GOLDFISH},1,2,3,4"
    )
    from_parquet = read_dataset(str(tmp_path), IMAGENET)
    assert from_parquet.items == read_dataset(str(tmp_path / "rows.csv"), IMAGENET).items
    assert from_parquet.items[0].boxes == ((1.0, 2.0, 3.0, 4.0),)


def ilsvrc(folder):
    for number in (1, 2, 3):
        picture(folder / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", (40, 30))
    return folder / "val"


GROUND_TRUTH = {
    "val.txt": "".join(f"ILSVRC2012_val_{n:08d}.JPEG {c}\n" for n, c in ((1, 1), (2, 0), (3, 1))),
    "imagenet_2012_validation_synset_labels.txt": f"{GOLDFISH}\n{TENCH}\n{GOLDFISH}\n",
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    f"ILSVRC2012_val_00000003,{GOLDFISH} 1 2 3 4 {GOLDFISH} 5 6 7 8 \n"
    f"ILSVRC2012_val_00000001,{GOLDFISH} 1 2 3 4 \nILSVRC2012_val_00000002,{TENCH} 9 9 12 12 \n",
}


@pytest.mark.parametrize("name", GROUND_TRUTH)
def test_ilsvrc2012(tmp_path, name):
    folder = ilsvrc(tmp_path)
    (tmp_path / name).write_text(GROUND_TRUTH[name])
    dataset = read_dataset(str(folder), IMAGENET)
    assert labels_of(dataset) == [1, 0, 1]
    if name.endswith(".csv"):
        assert dataset.items[2].boxes == ((1, 2, 3, 4), (5, 6, 7, 8))


@pytest.mark.parametrize("beside", [(), ("meta.mat",)])
def test_the_development_kit_s_numbers_are_refused_with_what_to_do(tmp_path, beside):
    folder = ilsvrc(tmp_path)
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n1\n490\n")
    for name in beside:
        (tmp_path / name).touch()
    with pytest.raises(
        InputError,
        match=r"numbers classes as the development kit.* meta\.mat.* one synset per line.*"
        r"\.csv listing.* class folders named by synset",
    ):
        read_dataset(str(folder), IMAGENET)


def test_ilsvrc2012_boxes_of_the_label_only(tmp_path):
    folder = ilsvrc(tmp_path)
    (tmp_path / "truth.txt").write_text(GROUND_TRUTH["imagenet_2012_validation_synset_labels.txt"])
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>9</xmax>"
        "<ymax>9</ymax></bndbox></object>"
        for name, x in ((GOLDFISH, 2), (TENCH, 3))
    )
    (tmp_path / "xml").mkdir()
    xml = tmp_path / "xml" / "ILSVRC2012_val_00000001.xml"
    xml.write_text(f"<annotation>{objects}</annotation>")
    dataset = read_dataset(
        str(folder), IMAGENET, ground_truth=tmp_path / "truth.txt", boxes=tmp_path / "xml"
    )
    assert [item.boxes for item in dataset.items] == [((2, 1, 9, 9),), (), ()]


def test_scenes_have_the_mask_of_their_label():
    first, second = read_dataset("scenes:2", Labels(12, tuple(CLASSES))).items
    seed = int(first.source.split()[1])
    scene = draw_scene(seed)
    assert second.source == f"scene {seed + 1}"
    assert first.label == scene.labels[0]
    mask = first.read_objects((112, 112))
    assert np.array_equal(np.asarray(first.read()), np.asarray(scene.image))
    assert np.array_equal(np.asarray(mask) > 0, scene.masks[0])
    with pytest.raises(UnknownClassError, match=r"row 1: no class is called|has no class names"):
        read_dataset("scenes:2", PETS)


def test_the_same_row_twice_counts_once(tmp_path):
    picture(tmp_path / "a.png")
    listing = tmp_path / "labels.csv"
    listing.write_text("image,label\na.png,0\na.png,1\na.png,0\n")
    dataset = read_dataset(str(tmp_path), PETS)
    assert labels_of(dataset) == [0, 1]  # one picture may have two classes
    assert dataset.duplicates == 1


def test_the_digest_changes_with_labels_boxes_and_masks(tmp_path):
    listing = tmp_path / "labels.csv"
    picture(tmp_path / "a.png")
    digests = set()
    for colour, row in (
        (0, "a.png,0,,"),
        (0, "a.png,1,,"),
        (0, 'a.png,1,"[[0, 0, 1, 1]]",'),
        (0, "a.png,1,,m.png"),
        (255, "a.png,1,,m.png"),
    ):
        Image.new("L", (20, 10), colour).save(tmp_path / "m.png")
        listing.write_text(f"image,label,boxes,mask\n{row}\n")
        digests.add(read_dataset(str(tmp_path), PETS).digest())
        assert read_dataset(str(tmp_path), PETS).digest() in digests
    assert len(digests) == 5


def test_pandas_columns_with_gaps(tmp_path):
    picture(tmp_path / "a.png")
    rows = {"image": ["a.png", "a.png"], "label": [2.0, float("nan")]}
    rows |= {corner: [1.0, float("nan")] for corner in ("xmin", "ymin", "xmax", "ymax")}
    parquet.write_table(pyarrow.table(rows), tmp_path / "labels.parquet")
    first, second = read_dataset(str(tmp_path), PETS).items
    assert (first.label, first.boxes) == (2, ((1, 1, 1, 1),))
    assert (second.label, second.boxes) == (None, ())


def test_folders_that_are_no_classes_are_left_out(tmp_path):
    picture(tmp_path / "0" / "a.png")
    for name in (".checkpoints", "2", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "run.json").write_text('{"generator": "vit-reciprocam"}')
    assert labels_of(read_dataset(str(tmp_path), PETS)) == [0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("val.txt", "", "damaged or not a ground-truth file"),
        (
            "LOC_val_solution.csv",
            "ImageId,P\nILSVRC2012_val_00000001,\n",
            "damaged or not a ground",
        ),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG 1\n", "has no label for 2 picture"),
        ("imagenet_2012_validation_synset_labels.txt", f"{TENCH}\n", "has 1 lines for 3 pictures"),
    ],
)
def test_damaged_ground_truth(tmp_path, name, content, words):
    folder = ilsvrc(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        read_dataset(str(folder), IMAGENET)


def test_annotations_that_are_missing_or_of_no_use(tmp_path):
    folder = ilsvrc(tmp_path)
    (tmp_path / "val.txt").write_text(GROUND_TRUTH["val.txt"])
    with pytest.raises(InputError, match="no such folder of boxes"):
        read_dataset(str(folder), IMAGENET, boxes=tmp_path / "gone")
    (tmp_path / "xml").mkdir()
    with pytest.raises(InputError, match="has no box file of these pictures"):
        read_dataset(str(folder), IMAGENET, boxes=tmp_path / "xml")
    (tmp_path / "xml" / "ILSVRC2012_val_00000002.xml").write_text("<annotation><obj")
    items = read_dataset(str(folder), IMAGENET, boxes=tmp_path / "xml").items
    assert [bool(item.problem) for item in items] == [False, True, False]
    with pytest.raises(ImageError, match=r"box file .* is damaged"):
        items[1].read()
    picture(tmp_path / "cats" / "0" / "a.png")
    with pytest.raises(InputError, match=r"are for ILSVRC2012's pictures: expected \.JPEG files"):
        read_dataset(str(tmp_path / "cats"), PETS, boxes=tmp_path / "xml")
    (tmp_path / "cats" / "labels.csv").write_text("image\n0/a.png\n")
    with pytest.raises(InputError, match=r"listing .*labels.csv must hold its own"):
        read_dataset(str(tmp_path / "cats"), PETS, boxes=tmp_path / "xml")


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ("image,label\n", InputError, "is empty"),
        ("file,label\na.png,0\n", InputError, "no column image.* its columns: file, label"),
        ("image,label\na.png,3\n", UnknownClassError, "row 1: class 3 does not exist"),
        ("image,label\na.png,bird\n", UnknownClassError, "row 1: no class is called 'bird'"),
        (f"image,label\na.png,{TENCH}\n", UnknownClassError, "synset n01440764 is not among the"),
        ('image,boxes\na.png,"[[1, 2]]"\n', InputError, r"row 1: boxes must be \[\[xmin"),
        ("image,xmin,ymin,xmax,ymax\na.png,1,2,x,4\n", InputError, "row 1: boxes must be"),
    ],
)
def test_bad_listings(tmp_path, rows, error, words):
    picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text(rows)
    with pytest.raises(error, match=words):
        read_dataset(str(tmp_path), PETS)


@pytest.mark.parametrize("read", [lambda data: read_dataset(data, PETS), check_dataset])
def test_bad_places(tmp_path, read):
    with pytest.raises(InputError, match=r"no such data set: .*nowhere"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds neither class folders nor labels"):
        read(str(tmp_path))
    with pytest.raises(InputError, match=r"expected a \.csv or \.parquet file"):
        read(str(picture(tmp_path / "a.png")))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read(str(tmp_path / "broken.parquet"))
    with pytest.raises(InputError, match="scenes:0 is empty"):
        read("scenes:0")
    (tmp_path / "0").mkdir()
    with pytest.raises(InputError, match="is empty"):
        read(str(tmp_path))


def test_a_check_takes_what_only_a_model_s_classes_can_refuse(tmp_path):
    picture(tmp_path / "nonsense" / "a.png")
    check_dataset(str(tmp_path))
    check_dataset("scenes:2")
    with pytest.raises(InputError, match="no such ground truth"):
        check_dataset(str(tmp_path), ground_truth=tmp_path / "gone")
    with pytest.raises(UnknownClassError):
        read_dataset(str(tmp_path), PETS)


def test_pictures_that_cannot_be_read_say_so_when_their_turn_comes(tmp_path):
    picture(tmp_path / "a.png")
    Image.new("L", (5, 5)).save(tmp_path / "small.png")
    (tmp_path / "labels.csv").write_text(
        "image,label,boxes,mask\n"
        "gone.png,0,,\n"
        'a.png,0,"[[15, 5, 25, 9]]",\n'
        'a.png,1,"[[5, 5, 4, 9]]",\n'
        "a.png,0,,small.png\n"
        "a.png,0,,no.png\n"
    )
    gone, *others = read_dataset(str(tmp_path), PETS).items
    with pytest.raises(ImageError, match=r"no such file: .*gone"):
        gone.read()
    words = (
        r"box .* is not inside .*a\.png, which is 20x10 pixels",
        "box .* is not inside",
        "is 5x5 pixels, its picture .* 20x10",
        "mask .* cannot be read",
    )
    for item, expected in zip(others, words, strict=True):
        assert item.read().size == (20, 10)
        with pytest.raises(ImageError, match=expected):
            item.read_objects((20, 10))
