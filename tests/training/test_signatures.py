"""Signatures: presets declare what they take, names are defined once, and a mistake is an error of the class called."""

import inspect
import re
from typing import Any, get_args, get_type_hints

import pytest
from lightning.pytorch import Callback
from torch import nn
from variants import square_root

import lightning_prune as lp
from lightning_prune import schedules, scopes

CALLBACKS = {
    name: value
    for name in lp.__all__
    if inspect.isclass(value := getattr(lp, name)) and issubclass(value, Callback) and "__init__" in vars(value)
}
REQUIRED = {
    **{name: {"sparsity": 0.9} for name in CALLBACKS if "sparsity" in inspect.signature(CALLBACKS[name]).parameters},
    "GuardedPruning": {"monitor": "acc"},
}
# the preset, what it declares beside the arguments of its base, what it does without, and which defaults are others
NEURONS = {"granularity": lp.Channel()}
PRESETS = [
    (lp.MagnitudePruning, lp.Pruning, set(), {"criterion"}, {}),
    (lp.RandomPruning, lp.Pruning, {"seed"}, {"criterion"}, NEURONS),
    (lp.EntropyPruning, lp.Pruning, {"prune", "bins", "window"}, {"criterion"}, NEURONS),
    (lp.SensitivityPruning, lp.Pruning, {"window"}, {"criterion"}, NEURONS),
    (lp.MovementPruning, lp.Pruning, {"window"}, {"criterion"}, {}),
    (lp.WandaPruning, lp.Pruning, {"window"}, {"criterion"}, {}),
    (lp.SNIPPruning, lp.Pruning, {"window"}, {"criterion"}, {"schedule": "one_shot", "start": 0}),
    (lp.RigL, lp.SET, {"window"}, set(), {"decay": "cosine"}),
]
# for every argument of a base a value that is not its default
OTHERS: dict[type, dict[str, Any]] = {
    lp.Pruning: {
        **{"sparsity": 0.25, "granularity": lp.Channel(round_to=2), "scope": "local", "schedule": square_root},
        **{"start": 1, "end": 9, "interval": "epoch", "frequency": 2, "targets": ["a.*"], "ignore": ["a.b"]},
        **{"log_layers": True, "of": "parameters", "shrink_at_end": True, "initial": 0.125},
    },
    lp.SET: {
        **{
            "sparsity": 0.25,
            "drop_fraction": 0.5,
            "decay": "linear",
            "scope": "local",
            "seed": 3,
            "start": 1,
            "end": 9,
        },
        **{"interval": "epoch", "frequency": 2, "targets": ["a.*"], "ignore": ["a.b"], "log_layers": True},
        "regrow": True,
    },
}
# those that do not go with the others
ALONE: dict[type, list[dict[str, Any]]] = {
    lp.Pruning: [{"threshold": 0.5}, {"sparsity": 0.5, "min_density": 0.125}],
    lp.SET: [{"grow_init": "random"}, {"granularity": lp.SharedFanIn(8)}],
}


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls).parameters)


def annotations(cls: type) -> dict[str, Any]:
    return get_type_hints(cls.__init__)


def test_every_preset_is_compared() -> None:
    below = {value for value in CALLBACKS.values() if issubclass(value, lp.Pruning) and value is not lp.Pruning}
    assert {preset for preset, base, *_ in PRESETS if base is lp.Pruning} == below


@pytest.mark.parametrize(("preset", "base", "own", "without", "defaults"), PRESETS)
def test_presets_declare_every_argument_of_their_base(
    preset: type, base: type, own: set[str], without: set[str], defaults: dict[str, Any]
) -> None:
    found, wanted = parameters(preset), {n: p for n, p in parameters(base).items() if n not in without}
    assert found.keys() == wanted.keys() | own
    assert {name: annotations(preset)[name] for name in wanted} == {name: annotations(base)[name] for name in wanted}
    for name, parameter in wanted.items():
        wanted_default = defaults.get(name, parameter.default)
        assert (type(found[name].default), found[name].default) == (type(wanted_default), wanted_default), name
    by_name = [name for name, parameter in found.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert by_name == [name for name in wanted if name in by_name], "in the order of the base"


@pytest.mark.parametrize(("preset", "base"), [(preset, base) for preset, base, *_ in PRESETS])
def test_presets_hand_every_argument_on(preset: type, base: type) -> None:
    cases = [OTHERS[base], *ALONE[base]]
    taken = set(parameters(base)) & set(parameters(preset))
    assert set().union(*cases) == taken, "a value that is not the default for each argument"
    for given in cases:
        one, other = preset(**given), base(**given)
        for name in given:
            assert getattr(one, name) == getattr(other, name), name
            assert getattr(one, name) != parameters(base)[name].default, name


@pytest.mark.parametrize("name", CALLBACKS)
def test_nothing_takes_arguments_of_any_name(name: str) -> None:
    kinds = {parameter.kind for parameter in parameters(CALLBACKS[name]).values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_misspelt_argument_is_an_error_of_the_class_that_was_called(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'sechedule'"):
        CALLBACKS[name](**REQUIRED.get(name, {}), sechedule="linear")


@pytest.mark.parametrize("name", [name for name in CALLBACKS if "sparsity" in parameters(CALLBACKS[name])])
def test_amount_is_called_sparsity(name: str) -> None:
    said = rf"^{name}\.__init__\(\) got an unexpected keyword argument 'amount': it is called sparsity here$"
    with pytest.raises(TypeError, match=said):
        CALLBACKS[name](amount=0.5)


@pytest.mark.parametrize("function", [lp.prune, lp.sparsegpt])
def test_amount_is_called_sparsity_in_functions(function: Any) -> None:
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'amount': it is called sparsity here$"):
        function(nn.Linear(2, 2), amount=0.5)


def test_the_names_of_scopes_and_schedules_are_those_of_the_tables() -> None:
    assert get_args(scopes.ScopeName) == tuple(scopes.SCOPES)
    assert get_args(schedules.ScheduleName) == tuple(schedules.SCHEDULES)


@pytest.mark.parametrize("name", [name for name in CALLBACKS if "scope" in parameters(CALLBACKS[name])])
def test_every_scope_has_a_name_in_the_signature_and_in_the_text(name: str) -> None:
    cls = CALLBACKS[name]
    default = type(None) if parameters(cls)["scope"].default is None else scopes.ScopeName
    assert annotations(cls)["scope"] == scopes.ScopeName | scopes.Scope | default
    documents = map(inspect.cleandoc, (base.__doc__ or "" for base in cls.__mro__))
    document = next(document for document in documents if "\n    scope: " in document)
    text = re.search(r"\n    scope: (.*?)\n    \w+: ", document, re.DOTALL)
    assert text is not None
    assert set(re.findall(r'"(\w+)"', text[1])) == set(scopes.SCOPES)


@pytest.mark.parametrize("name", [name for name in CALLBACKS if "targets" in parameters(CALLBACKS[name])])
def test_patterns_are_any_sequence_and_kept_as_a_tuple(name: str) -> None:
    callback = CALLBACKS[name](**REQUIRED.get(name, {}), targets=["a.*"], ignore=["a.b"])
    assert (callback.targets, callback.ignore) == (("a.*",), ("a.b",))


STRINGS = {
    "criterion": {"magnitude": "Magnitude()", "batch_norm_scale": "BatchNormScale()", "SNIP": "SNIP()"},
    "granularity": {"channel": "Channel()", "input_channel": "InputChannel()", "nm": "NM()"},
}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, axis) for name in CALLBACKS for axis in STRINGS if axis in parameters(CALLBACKS[name])],
)
def test_a_string_for_an_object_is_told_the_call(name: str, argument: str) -> None:
    for given, call in STRINGS[argument].items():
        message = f"{argument} must be a {argument.capitalize()}, got the string '{given}': pass {call}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            CALLBACKS[name](**{**REQUIRED.get(name, {}), argument: given})
