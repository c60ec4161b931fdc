import importlib
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed
from torchmetrics import MetricCollection

from conftest import tiny_images, tiny_model
from vit_reciprocam import metrics, perturbation, torch_metrics
from vit_reciprocam.errors import InputError, MissingDependencyError
from vit_reciprocam.maps import box_masks
from vit_reciprocam.protocols import PROTOCOLS

COUNT, SIZE = 7, (8, 12)
MODEL = tiny_model()  # pictures of 8x12 pixels, 5 classes


def data():
    """What 7 pictures give, by the names of the classes' parameters; maps far from constant."""
    rng = np.random.default_rng(5)
    boxes = np.array([[left, 0, left + 5, 6] for left in range(COUNT)])
    return {
        "p": torch.from_numpy(rng.random(COUNT)),
        "o": torch.from_numpy(rng.random(COUNT)),
        "maps": torch.from_numpy(rng.random((COUNT, 2, 3))),
        "masked_maps": torch.from_numpy(rng.random((COUNT, 2, 3))),
        "images": tiny_images(count=COUNT),
        "targets": torch.arange(COUNT) % 5,
        "boxes": torch.from_numpy(boxes),
        "regions": torch.from_numpy(boxes),
        "masks": torch.from_numpy(box_masks(boxes, SIZE)),
        "model": MODEL,
    }


def softmax(images):
    with torch.no_grad():
        return MODEL(torch.from_numpy(images)).double().softmax(-1).numpy()


def arrays():
    return {k: v.numpy() for k, v in data().items() if isinstance(v, torch.Tensor)}


def perturbed(function, **options):
    d = arrays()
    baseline = perturbation.baseline_images(d["images"])
    return function(softmax, d["images"], baseline, d["maps"], d["targets"], **options)


WIDE = {"size": SIZE, "mode": "bicubic"}
# name: (metric, names of what it takes, each picture's value, is higher better)
CASES = {
    "drop": (
        torch_metrics.AverageDrop,
        ("p", "o"),
        lambda d: metrics.average_drop(d["p"], d["o"]),
        False,
    ),
    "increase": (
        torch_metrics.AverageIncrease,
        ("p", "o"),
        lambda d: metrics.average_increase(d["p"], d["o"]),
        True,
    ),
    "coherency": (
        torch_metrics.Coherency,
        ("maps", "masked_maps"),
        lambda d: metrics.coherency(d["maps"], d["masked_maps"]),
        True,
    ),
    "coherency of pictures": (
        lambda: torch_metrics.Coherency(**WIDE),
        ("maps", "masked_maps"),
        lambda d: metrics.coherency(d["maps"], d["masked_maps"], **WIDE),
        True,
    ),
    "complexity": (
        torch_metrics.Complexity,
        ("maps",),
        lambda d: metrics.complexity(d["maps"]),
        False,
    ),
    "complexity of pictures": (
        lambda: torch_metrics.Complexity(**WIDE),
        ("maps",),
        lambda d: metrics.complexity(d["maps"], **WIDE),
        False,
    ),
    "adcc of pictures": (
        lambda: torch_metrics.ADCC("mean", **WIDE),
        ("p", "o", "maps", "masked_maps"),
        lambda d: metrics.adcc(
            metrics.coherency(d["maps"], d["masked_maps"], **WIDE),
            metrics.complexity(d["maps"], **WIDE),
            metrics.average_drop(d["p"], d["o"]),
        ),
        True,
    ),
    "insertion": (
        lambda: torch_metrics.InsertionAUC(steps=3),
        ("model", "images", "maps", "targets"),
        lambda d: perturbed(perturbation.insertion, steps=3),
        True,
    ),
    "deletion": (
        lambda: torch_metrics.DeletionAUC(unit="pixel", mode="bicubic"),
        ("model", "images", "maps", "targets"),
        lambda d: perturbed(perturbation.deletion, unit="pixel", mode="bicubic"),
        False,
    ),
    "pointing with boxes": (
        lambda: torch_metrics.PointingGame(size=SIZE, tolerance=1),
        ("maps", "regions"),
        lambda d: metrics.pointing_game(d["maps"], d["boxes"], size=SIZE, tolerance=1),
        True,
    ),
    "pointing with masks": (
        torch_metrics.PointingGame,
        ("maps", "masks"),
        lambda d: metrics.pointing_game(d["maps"], d["masks"]),
        True,
    ),
    "energy": (
        lambda: torch_metrics.EnergyInBox(size=SIZE),
        ("maps", "boxes"),
        lambda d: metrics.energy_in_box(d["maps"], d["boxes"], size=SIZE),
        True,
    ),
    "mass": (
        lambda: torch_metrics.MassAccuracy(mode="bicubic"),
        ("maps", "masks"),
        lambda d: metrics.mass_accuracy(d["maps"], d["masks"], mode="bicubic"),
        True,
    ),
}
EACH = pytest.mark.parametrize(
    ("make", "names", "expected", "higher"), CASES.values(), ids=CASES.keys()
)


def part(names, pictures):
    """What `update` takes for some of the pictures."""
    values = data()
    return [values[n] if n == "model" else values[n][pictures] for n in names]


@EACH
def test_the_mean_over_pictures_however_they_are_batched(make, names, expected, higher):
    values = expected(arrays())
    assert np.ptp(values) > 0  # a weighting by batches would show
    metric = make()
    metric.update(*part(names, slice(0, 5)))
    metric.update(*part(names, slice(5, COUNT)))
    assert metric.compute().dtype == torch.float64
    np.testing.assert_allclose(metric.compute(), values.mean(), rtol=1e-6)
    metric.reset()
    metric.update(*part(names, slice(2, 3)))
    np.testing.assert_allclose(metric.compute(), values[2], rtol=1e-6)


@EACH
def test_forward_gives_the_batch_and_keeps_the_whole(make, names, expected, higher):
    values, metric = expected(arrays()), make()
    np.testing.assert_allclose(metric(*part(names, slice(0, 5))), values[:5].mean(), rtol=1e-6)
    np.testing.assert_allclose(metric(*part(names, slice(5, 7))), values[5:].mean(), rtol=1e-6)
    np.testing.assert_allclose(metric.compute(), values.mean(), rtol=1e-6)


@EACH
def test_states_merge_as_over_processes(make, names, expected, higher):
    one, other = make(), make()
    one.update(*part(names, slice(0, 5)))
    other.update(*part(names, slice(5, 7)))
    one.merge_state(other)
    np.testing.assert_allclose(one.compute(), expected(arrays()).mean(), rtol=1e-6)


@EACH
def test_what_torchmetrics_asks_of_a_metric(make, names, expected, higher):
    metric = make()
    assert metric.higher_is_better is higher
    assert metric.is_differentiable is False
    assert metric.full_state_update is False
    with pytest.warns(UserWarning, match="called before the ``update`` method"):
        assert metric.compute().isnan()


def adcc(aggregate, pictures=slice(None)):
    metric = torch_metrics.ADCC(aggregate)
    metric.update(*part(("p", "o", "maps", "masked_maps"), pictures))
    return metric


def test_adcc_of_a_data_set_by_either_definition():
    d = arrays()
    columns = {
        "p": d["p"],
        "o": d["o"],
        "coherency": metrics.coherency(d["maps"], d["masked_maps"]),
        "complexity": metrics.complexity(d["maps"]),
    }
    for protocol in PROTOCOLS.values():
        expected = protocol.summary(columns)["adcc"] / 100
        merged = adcc(protocol.adcc, slice(0, 5))
        merged.merge_state(adcc(protocol.adcc, slice(5, 7)))
        np.testing.assert_allclose(adcc(protocol.adcc).compute(), expected)
        np.testing.assert_allclose(merged.compute(), expected)
    assert abs(adcc("means").compute() - adcc("mean").compute()) > 1e-3


def test_adcc_of_nothing_and_of_an_unknown_aggregate():
    with pytest.warns(UserWarning, match="called before"):
        assert torch_metrics.ADCC().compute().isnan()
    with pytest.raises(InputError, match="'means', 'mean'; got 'median'"):
        torch_metrics.ADCC("median")


def test_a_collection_is_updated_by_keyword():
    names = ("AverageDrop", "AverageIncrease", "Coherency", "Complexity", "ADCC", "InsertionAUC")
    collection = MetricCollection([getattr(torch_metrics, name)() for name in names])
    given = {k: data()[k] for k in ("p", "o", "maps", "masked_maps", "images", "targets", "model")}
    collection.update(**given)
    got = collection.compute()
    assert set(got) == set(names)
    d = arrays()
    np.testing.assert_allclose(got["AverageDrop"], metrics.average_drop(d["p"], d["o"]).mean())
    np.testing.assert_allclose(got["ADCC"], adcc("means").compute())


def test_metrics_that_agree_on_the_first_batch_stay_apart_in_a_collection():
    collection = MetricCollection(
        {
            "drop": torch_metrics.AverageDrop(),
            "increase": torch_metrics.AverageIncrease(),
            "strict": torch_metrics.PointingGame(size=(1, 4)),
            "tolerant": torch_metrics.PointingGame(size=(1, 4), tolerance=1),
        }
    )
    p, maps = torch.tensor([0.5]), torch.tensor([[[1.0, 0.0]]])  # the maximum is the first pixel
    collection.update(p=p, o=p, maps=maps, regions=torch.tensor([[2, 0, 4, 1]]))  # all of them 0
    collection.update(p=p, o=p / 2, maps=maps, regions=torch.tensor([[1, 0, 4, 1]]))
    got = {name: value.item() for name, value in collection.compute().items()}
    assert got == {"drop": 0.25, "increase": 0, "strict": 0, "tolerant": 0.5}


def test_arrays_and_low_precision_are_taken_too():
    for convert in (lambda x: x.numpy(), lambda x: x.bfloat16(), lambda x: x.requires_grad_()):
        metric = torch_metrics.Complexity()
        metric.update(convert(torch.full((2, 2, 2), 0.25)))
        assert metric.compute() == 0.25
        assert not metric.compute().requires_grad


def test_the_model_is_called_in_the_images_dtype_and_left_as_it_was():
    model = tiny_model().double().train()
    images = tiny_images(count=2).double()
    metric = torch_metrics.InsertionAUC(steps=2, baseline="black", mean=(0.5,) * 3, std=(0.5,) * 3)
    metric.update(model, images, torch.rand(2, 2, 3), torch.tensor([0, 1]))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not list(metric.children())  # and is no part of the metric
    assert 0 < metric.compute() < 1


def test_bad_input_is_refused_before_it_is_counted():
    metric = torch_metrics.AverageDrop()
    with pytest.raises(InputError, match="percentages"):
        metric.update(torch.tensor([50.0]), torch.tensor([20.0]))
    metric.update(torch.tensor([0.5]), torch.tensor([0.25]))
    assert metric.compute() == 0.5


def test_without_torchmetrics_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "vit_reciprocam.torch_metrics")
    with pytest.raises(MissingDependencyError, match=r"vit-reciprocam\[evaluate\]"):
        importlib.import_module("vit_reciprocam.torch_metrics")


OTHER_PROCESS = """
import sys, numpy as np, torch
from vit_reciprocam.torch_metrics import ADCC, AverageDrop
folder = sys.argv[1]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=1, world_size=2
)
d = np.load(f"{folder}/data.npz")
drop, adcc = AverageDrop(), ADCC("means")
drop.update(d["p"], d["o"])
adcc.update(d["p"], d["o"], d["maps"], d["masked_maps"])
print(drop.compute().item(), adcc.compute().item())
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree_on_the_whole(tmp_path):
    names = ("p", "o", "maps", "masked_maps")
    theirs = dict(zip(names, part(names, slice(5, 7)), strict=True))
    np.savez(tmp_path / "data.npz", **{name: tensor.numpy() for name, tensor in theirs.items()})
    whole = torch_metrics.AverageDrop()
    whole.update(*part(("p", "o"), slice(None)))
    expected = [whole.compute(), adcc("means").compute()]
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{tmp_path}/meet",
                rank=0,
                world_size=2,
                timeout=timedelta(minutes=5),
            )
            drop = torch_metrics.AverageDrop()
            drop.update(*part(("p", "o"), slice(0, 5)))
            ours = [drop.compute(), adcc("means", slice(0, 5)).compute()]
            found = [float(value) for value in other.communicate()[0].split()]
        finally:
            other.kill()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    np.testing.assert_allclose(ours, expected)
    np.testing.assert_allclose(found, expected)
