"""Arguments: whatever is given for any argument of anything public works, or is refused by a message that names it."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from variants import METHODS as VARIANTS

import lightning_prune as lp
from lightning_prune.reporting.yaml_config import plain
from lightning_prune.structure.checkpoints import KEY
from lightning_prune.validation.values import scalar, shown


def network() -> nn.Module:
    """A network whose second layer does not read two channels of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight[:, 2:])
    return model


@cache
def shrunk() -> nn.Module:
    return lp.shrink(network(), torch.zeros(1, 4))


def checkpoint() -> dict[str, Any]:
    small = shrunk()
    return {"state_dict": small.state_dict(), KEY: small._kept_channels.state_dict()}


@cache
def fast() -> nn.Module:
    return lp.to_sparse_csr(network(), min_sparsity=0.0, min_weights=1)


def fast_file() -> Path:
    lp.save_fast(fast(), "fast.pt")
    return Path("fast.pt")


def total(model: nn.Module, loader: Any) -> float:
    """A user's metric."""
    return sum(float(model(batch).sum()) for batch in loader)


def batches() -> list[Tensor]:
    return [torch.ones(2, 4)]


def analysis() -> lp.SensitivityAnalysis:
    return lp.SensitivityAnalysis("acc", "max", 0.9, {"0.weight": {0.5: 0.9}})


# what must be given, or should be, for a call that would work
VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "GuardedPruning": lambda: {"monitor": "acc"},
    "SensitivityAnalysis": lambda: {"metric": "acc", "mode": "max", "dense": 0.9, "scores": {"a": {0.5: 0.9}}},
    "LatencyTable": lambda: {"layers": (), "rest": (0.5, 1.5), "dense": 4.0, "granularity": "Channel"},
    "export_onnx": lambda: {"model": network(), "example_inputs": torch.zeros(2, 4), "path": "model.onnx"},
    "load_compressed": lambda: {"path": "model.safetensors"},
    "load_fast": lambda: {"model": network, "path": fast_file()},
    "load_shrunk": lambda: {"model": network, "checkpoint": checkpoint()},
    "measure_latency": lambda: {"model": network(), "example_inputs": torch.zeros(1, 4)},
    "permute_rows": lambda: {"model": network(), "example_inputs": torch.zeros(1, 4), "sparsity": 0.5},
    "plot_history": lambda: {"history": lp.History([(0, 0.0)], {"acc": [(1, 0.9)]}), "metric": "acc"},
    "plot_masks": lambda: {"masks": {"weight": torch.ones(2, 2, dtype=torch.bool)}},
    "plot_schedule": lambda: {"callback": lp.MagnitudePruning(0.5), "length": 10},
    "plot_sensitivity": lambda: {"analysis": analysis()},
    "plot_sparsity": lambda: {"model": network()},
    "prune": lambda: {"model": network(), "sparsity": 0.5, "criterion": lp.Wanda(1), "data": batches()},
    "recalibrate": lambda: {"model": nn.Sequential(nn.BatchNorm1d(4)), "loader": batches()},
    "save_compressed": lambda: {"model_or_state": network(), "path": "model.safetensors"},
    "save_fast": lambda: {"model": fast(), "path": "model.pt"},
    "save_shrunk": lambda: {"model": shrunk(), "path": "model.pt"},
    "sensitivity": lambda: {
        **{"model": network(), "data": batches(), "metric": total, "levels": [0.5], "progress": False},
        **{"criterion": lp.Wanda(1)},
    },
    "shrink": lambda: {"model": network(), "example_inputs": torch.zeros(1, 4)},
    "sparsegpt": lambda: {"model": network(), "sparsity": 0.5, "data": batches()},
    "sparsity": lambda: {"model": network()},
    "summary": lambda: {"model": network()},
    "to_fast": lambda: {"model": network(), "example_inputs": torch.zeros(1, 4)},
    "to_sparse_csr": lambda: {"model": network(), "min_sparsity": 0.0, "min_weights": 1},
    "to_sparse_semi_structured": lambda: {"model": network()},
    "ActiveFLOPs.update": lambda: {"model": network()},
    "ActiveParameters.update": lambda: {"model": network()},
    "MaskOverlap.update": lambda: {"model": network()},
    "Masks.apply": lambda: {"model": network()},
    "SensitivityAnalysis.recommend": dict,
    "Sparsity.update": lambda: {"model": network()},
    **dict.fromkeys(("ACDC", "ADMM", "LotteryTicket"), lambda: {"sparsity": 0.5}),
    **dict.fromkeys(
        (name for name in lp.__all__ if name.endswith("Pruning") and name != "GuardedPruning"),
        lambda: {"sparsity": 0.5},
    ),
    "PruningAtInit": lambda: {"sparsity": 0.5},
}


def required(build: partial) -> dict[str, Any]:
    """Of what a variant of a method gives, that which must be given."""
    signature = inspect.signature(build.func)
    given = signature.bind_partial(*build.args, **build.keywords).arguments
    return {name: value for name, value in given.items() if signature.parameters[name].default is signature.empty}


for variant in VARIANTS.values():
    VALID.setdefault(variant.func.__name__, partial(required, variant))
METHODS: dict[str, Callable[[], Callable[..., Any]]] = {
    "ActiveFLOPs.update": lambda: lp.ActiveFLOPs(torch.zeros(1, 4)).update,
    "ActiveParameters.update": lambda: lp.ActiveParameters().update,
    "MaskOverlap.update": lambda: lp.MaskOverlap().update,
    "Masks.apply": lambda: lp.Masks({"0.weight": torch.ones(4, 4, dtype=torch.bool)}).apply,
    "SensitivityAnalysis.recommend": lambda: analysis().recommend,
    "Sparsity.update": lambda: lp.Sparsity().update,
}
# whose arguments are those of a dict, or Lightning's own
OTHERS = {"Masks", "Units", "SparseEarlyStopping", "SparseModelCheckpoint"}

# what the user's own code says
LOSS = nn.CrossEntropyLoss()
OWN = [
    *((load, "model", given) for load in ("load_shrunk", "load_fast") for given in (nn.Linear, len)),
    ("ActiveFLOPs.update", "model", LOSS),
]

BAD: tuple[Any, ...] = (
    *(None, math.nan, math.inf, -math.inf, True, False, 0, -1, -0.5, 1.5, 2.5, 90, 10**9, 10**400),
    *("0.9", "nonsense", "", b"bytes", [], [0.5], [nn.ReLU()], ["nonsense"], (), {}, {"a": 0.5}, {0: 0.5}, {1.5}),
    *(np.float32(0.5), np.int64(2), np.bool_(True), np.array([0.5, 2.0]), np.array(0.5)),
    *(torch.tensor(0.5), torch.tensor(2), torch.tensor(math.nan), torch.rand(2, 2), torch.zeros((), device="meta")),
    *(lp.Magnitude, lp.OWL, nn.Linear, nn.ReLU(), LOSS, object(), len, lambda: 0, 1j, ...),
)


def public(name: str) -> Callable[..., Any]:
    return METHODS[name]() if name in METHODS else getattr(lp, name)


def parameters(function: Callable[..., Any]) -> dict[str, tuple[inspect.Parameter, Any]]:
    """The parameters of a function, or of a class and the bases that it passes keywords on to, with their types."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for made in (
        [base for base in function.__mro__ if "__init__" in vars(base)] if inspect.isclass(function) else [function]
    ):
        if made.__module__.partition(".")[0] != "lightning_prune":
            break
        its = inspect.signature(made).parameters.values()
        hints = get_type_hints(made.__init__ if inspect.isclass(made) else made, None, vars(_names()))
        found = {
            p.name: (p, hints.get(p.name, Any)) for p in its if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        } | found
        if not any(p.kind is p.VAR_KEYWORD for p in its):
            break
    return found


def _names() -> Any:
    """What annotations name that are not imported where they stand."""
    from types import SimpleNamespace

    from lightning.pytorch import Trainer
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_prune.models import summary as report

    return SimpleNamespace(Axes=Axes, Figure=Figure, Trainer=Trainer, Pruning=lp.Pruning, nn=nn, report=report)


def kinds(hint: Any) -> Iterator[Any]:
    """The types that a hint allows, one at a time."""
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from kinds(part)
    else:
        yield hint


def certainly_wrong(hint: Any, value: Any) -> bool:
    """Whether a value is none of what a hint allows, however generously it is read."""
    value, allowed = scalar(value), set(kinds(hint))
    if allowed <= {int, float, bool, NoneType}:
        if value is None or isinstance(value, bool):
            return type(value) not in allowed
        return not isinstance(value, int | float) or (isinstance(value, float) and not allowed & {float})
    if allowed in ({Sequence[str]}, {tuple[str, ...]}):
        return not isinstance(value, list | tuple | set) or not all(isinstance(entry, str) for entry in value)
    if all(inspect.isclass(kind) and kind.__module__.startswith(("lightning_prune", "torch.nn")) for kind in allowed):
        return not isinstance(value, tuple(allowed))
    return all(get_origin(kind) is Literal for kind in allowed)  # none of the names is among the values


def names_value(message: str, value: Any) -> bool:
    """Whether a message shows a value, or a part of it, or says what it is."""
    plainly = scalar(value)
    plainly = plainly.tolist() if isinstance(plainly, np.ndarray) else plainly
    parts = [value, *(plainly if isinstance(plainly, list | tuple | set | Mapping) else ())]
    empty = isinstance(value, list | tuple | dict) and not value
    if empty or any(isinstance(part, nn.Module) for part in parts):
        return "got" in message  # what it lacks
    parts += plainly.values() if isinstance(plainly, Mapping) else ()
    told = {shown(part) for part in parts} | {repr(part)[:20] for part in parts}
    told |= {str(part)[:20] for part in parts if isinstance(part, int | float | str) and str(part)}
    return any(part in message for part in told)


def fault(name: str, parameter: str, hint: Any, value: Any) -> str | None:
    """What is wrong with the answer to one bad argument; None for nothing."""
    arguments = VALID.get(name, dict)()
    models = [a for a in arguments.values() if isinstance(a, nn.Module)]
    before = [{key: tensor.clone() for key, tensor in model.state_dict().items()} for model in models]
    case = f"{name}({parameter}={shown(value)})"
    try:
        public(name)(**{**arguments, parameter: value})
    except (ValueError, TypeError, FileNotFoundError) as error:
        message = str(error)
        if any([name, parameter] == own and value is given for *own, given in OWN) or "multiple values" in message:
            return None  # a preset fixes an argument of its base
        if not re.search(rf"\b{parameter}\b", message):
            return f"{case} does not name the argument: {type(error).__name__}: {message}"
        if not names_value(message, value):
            return f"{case} does not show the value: {type(error).__name__}: {message}"
        after = [model.state_dict() for model in models]
        same = all(torch.equal(t, b[key]) for b, a in zip(before, after, strict=True) for key, t in a.items())
        return None if same else f"{case} has changed the model: {message}"
    except Exception as error:
        return f"{case} raises {type(error).__name__}: {error}"
    return f"{case} is accepted" if certainly_wrong(hint, value) else None


CALLABLES = [*(name for name in lp.__all__ if name not in OTHERS), *METHODS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLABLES)
def test_every_bad_value_of_every_argument_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "export_onnx":  # a second for each export
        pytest.importorskip("onnxruntime")
        monkeypatch.setattr("lightning_prune.export.onnx._write", lambda *_: None)
        monkeypatch.setattr("lightning_prune.export.onnx._verify", lambda *_: None)
    found = parameters(public(name))
    missing = [p.name for p, _ in found.values() if p.default is p.empty and p.name not in VALID.get(name, dict)()]
    assert not missing, f"add it to the table of valid arguments: {name} needs {missing}"
    faults = [fault(name, parameter, hint, value) for parameter, (_, hint) in found.items() for value in BAD]
    wrong = [told for told in faults if told]
    assert not wrong, f"{len(wrong)} of {len(faults)}:\n" + "\n".join(wrong)


NUMBERS = [name for name in CALLABLES if name != "SensitivityAnalysis" and inspect.isclass(getattr(lp, name, None))]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "wrap",
    [np.array, lambda value: torch.from_numpy(np.array(value)), lambda value: np.array(value)[()]],
    ids=["numpy", "torch", "generic"],
)
def test_scalars_of_numpy_and_torch_are_the_numbers_that_they_are(name: str, wrap: Callable[[Any], Any]) -> None:
    usual = VALID.get(name, dict)()
    defaults = {p.name: p.default for p, _ in parameters(public(name)).values()}
    given = {key: value for key, value in {**defaults, **usual}.items() if type(value) in (int, float, bool)}
    given |= {key: 2 for key in ("start", "rewind_to") if key in given}  # two intervals, and not twice the run
    given |= {key: 3 for key in ("end",) if key in given}
    one = public(name)(**{**usual, **given})
    other = public(name)(**{**usual, **{key: wrap(value) for key, value in given.items()}})
    assert repr(plain(one)) == repr(plain(other))
    assert [type(value) for value in vars(one).values()] == [type(value) for value in vars(other).values()]
    yaml.safe_dump(plain(other))


class Custom(lp.Criterion):
    """A user's criterion, which checks nothing."""

    def __init__(self, power: Any = 1.0, kind: Any = "a") -> None:
        self.power, self.kind = power, kind


def test_a_configuration_is_plain_whatever_the_arguments_of_a_users_class_are() -> None:
    found = plain(lp.Pruning(0.5, Custom(np.float64(2.0), np.str_("b")), scope=np.str_("erk")))
    text = yaml.safe_dump(found)
    assert "power: 2.0" in text
    assert "kind: b" in text
    assert "scope: erk" in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda junk: lp.Pruning(0.5, schedule=lambda _: junk), r"schedule\(0\) must be a number"),
        (lambda junk: lp.SET(0.5, decay=lambda _: junk), r"decay\(0\) must be a number"),
        (
            lambda junk: lp.prune(network(), 0.5, scope=lambda scores, _: dict.fromkeys(scores, junk)),
            r"scope\(\)\['0.weight'\] must be a number",
        ),
        (
            lambda junk: lp.sensitivity(network(), batches(), lambda *_: junk, [0.5], progress=False),
            "the result of metric must be a number",
        ),
        (
            lambda junk: lp.prune(network(), 0.5, criterion=lp.SNIP(), data=batches(), loss=lambda *_: junk),
            "loss must return one number, a tensor",
        ),
    ],
)
@pytest.mark.parametrize("junk", ["0.5", None, torch.ones(2), [0.5]], ids=shown)
def test_what_users_functions_return_is_refused_by_the_argument(
    call: Callable[[Any], Any], message: str, junk: Any
) -> None:
    with pytest.raises(TypeError, match=rf"{message}, got {re.escape(shown(junk))}"):
        call(junk)


def write(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda _: lp.Pruning(0.5, criterion="magnitude"),
            "criterion must be a Criterion, got the string 'magnitude': pass Magnitude()",
        ),
        (
            lambda _: lp.Pruning(0.5, criterion=lp.Magnitude),
            "criterion must be a Criterion, got the class Magnitude: pass Magnitude()",
        ),
        (
            lambda _: lp.prune(network(), 0.5, granularity="channel"),
            "granularity must be a Granularity, got the string 'channel': pass Channel()",
        ),
        (
            lambda _: lp.Pruning(0.5, scope=lp.OWL),
            "scope must be one of ['erk', 'global', 'lamp', 'local'] or a callable of scores and sparsity, "
            "got the class OWL: pass OWL()",
        ),
        (lambda _: lp.prune(nn.Linear, 0.5), "model must be a Module, got the class Linear: pass Linear(...)"),
        (
            lambda _: lp.Pruning(0.5, targets=[nn.ReLU()]),
            "targets must contain patterns of parameter names, got ReLU(): names are those of "
            'model.named_parameters(), and "*" matches any part of one',
        ),
        (lambda _: lp.SRSTE(2.5, 4), "n must be an int, got 2.5"),
        (lambda _: lp.SRSTE(2.0, 4), "n must be an int, got 2.0: did you mean 2?"),
        (lambda _: lp.RigL(0.5, window=math.nan), "window must be an int, got nan"),
        (lambda _: lp.Distillation(temperature=math.nan), "temperature must be above 0 and finite, got nan"),
        (
            lambda _: lp.prune(network(), 0.5, criterion=lp.Wanda(1), data=torch.ones(2, 4)),
            "data must be an iterable of batches, got a Tensor of shape (2, 4): pass [batch] for one batch",
        ),
        (
            lambda folder: lp.load_shrunk(network, write(network().state_dict(), folder / "weights.pt")),
            "checkpoint must be one of a shrunk model, by save_shrunk or a Trainer, got the entries "
            "['0.weight', '0.bias', '2.weight', '2.bias']",
        ),
        (
            lambda folder: lp.load_shrunk(Plain, write(network().state_dict(), folder / "weights.pt")),
            "checkpoint must be one of a shrunk model, by save_shrunk or a Trainer, got the entries "
            "['0.weight', '0.bias', '2.weight', '2.bias']",
        ),
        (
            lambda folder: lp.load_shrunk(Plain, write(torch.ones(2), folder / "weights.pt")),
            "checkpoint must be one of a shrunk model, by save_shrunk or a Trainer, got a Tensor of shape (2,)",
        ),
    ],
)
def test_what_is_easily_mistaken_is_told_with_the_way_out(
    call: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError)) as told:
        call(tmp_path)
    assert str(told.value) == message


class Plain(LightningModule):
    """A model that was never shrunk."""


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04no zip"])
@pytest.mark.parametrize("model", [network, Plain])
def test_a_file_of_something_else_is_no_checkpoint(model: Any, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint must be .* of a shrunk model.*weights\.pt"):
        lp.load_shrunk(model, path)


def test_a_mistaken_length_of_a_run_is_refused_instead_of_filling_the_memory() -> None:
    with pytest.raises(ValueError, match="frequency must leave at most 1,000,000 updates, got 1 from 0 to 10000000000"):
        lp.Pruning(0.5, start=0, end=10**10, frequency=1).plan(0, 10**10)
    with pytest.raises(ValueError, match="rounds must be at most 10000, got 1000000"):
        lp.prune(network(), 0.5, rounds=10**6)
    assert lp.prune(network(), 0.5, granularity=lp.Block(10**9, 10**9)).sparsity == pytest.approx(8 / 24)
