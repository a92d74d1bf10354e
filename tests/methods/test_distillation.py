"""Distillation: the same gradients as a loss written by hand, from a teacher that stays what it was."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from models import MLP, QUIET, On, fit, weights
from modes import StatefulLoader, assert_nothing_left
from ranks import run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from lightning_prune import Distillation, MagnitudePruning

SHARE, TEMPERATURE = 0.3, 3.0
LESSON: dict[str, Any] = {"weight": SHARE, "temperature": TEMPERATURE}
PRUNING: dict[str, Any] = {"schedule": "linear", "start": 2, "end": 6, "frequency": 2}
scaler = torch.amp.GradScaler


def expert(seed: int = 5) -> MLP:
    """A teacher with large logits, so that its lessons count."""
    teacher = MLP(seed=seed)
    with torch.no_grad():
        teacher.net[-1].weight.mul_(8)
    return teacher


def test_a_dense_teacher_that_is_still_learning_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r'teacher="dense" is the model as it is now, while its loss is still falling'):
        fit(MLP(), MagnitudePruning(0.5, start=16, end=18), Distillation(), max_epochs=5)
    trained = MLP()
    fit(trained, max_epochs=40)
    fit(trained, MagnitudePruning(0.5, start=16, end=18), Distillation(), max_epochs=5)


class Student(MLP):
    """An MLP that can be trained in several ways; the loss is a method, so that a test can change it."""

    def __init__(self, manual: bool = False, inplace: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = not manual
        self.net[2].inplace = inplace

    def loss(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss.sqrt().square())  # a loss whose value the backward pass still needs
        self.optimizers().step()
        return None


class ByHand(Student):
    """The same with distillation in its own code."""

    def __init__(self, teacher: nn.Module, layer: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.aside = (teacher.eval(), layer)

    def loss(self, batch: list[Tensor]) -> Tensor:
        teacher, layer = self.aside
        if layer is None:
            found, wanted = self(batch[0]), teacher(batch[0]).detach()
            soft, target = (found / TEMPERATURE).log_softmax(-1), (wanted / TEMPERATURE).softmax(-1)
            distance = TEMPERATURE**2 * kl_div(soft, target, reduction="batchmean")
        else:
            depth = int(layer.removeprefix("net.")) + 1
            hidden = self.net[:depth](batch[0])
            distance = mse_loss(hidden, teacher.net[:depth](batch[0]).detach())
            found = self.net[depth:](hidden.clone())
        return (1 - SHARE) * cross_entropy(found, batch[1]) + SHARE * distance


def scaled(growth: int) -> dict[str, Any]:
    made = scaler("cpu", init_scale=64.0, growth_interval=growth)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", made)]}


WAYS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "plain": ({}, dict),
    "accumulate": ({}, lambda: {"accumulate_grad_batches": 3}),
    "clip": ({}, lambda: {"gradient_clip_val": 0.1}),
    "bf16-mixed": ({}, lambda: {"precision": "bf16-mixed"}),
    "16-mixed": ({}, lambda: scaled(2)),
    "manual": ({"manual": True}, dict),
    "manual 16-mixed": ({"manual": True}, lambda: scaled(2)),
    "in place": ({"inplace": True}, dict),
    "lbfgs": ({"optimizer": "lbfgs"}, dict),
}


def assert_close(found: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layer", [None, "net.1", "net.4"])
@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_of_a_loss_written_by_hand(way: str, layer: str | None) -> None:
    arguments, trainer = WAYS[way]
    expected, model, plain = ByHand(expert(), layer, **arguments), Student(**arguments), Student(**arguments)
    fit(expected, **trainer())
    fit(model, Distillation(expert(), layer=layer, **LESSON), **trainer())
    fit(plain, **trainer())
    half = "16" in way
    assert_close(model, expected, 2e-2 if half else 1e-5)
    assert (model.net[6].weight - plain.net[6].weight).abs().max() > 0.001


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("where", ["whole", "inside"])
def test_compiled_modules_are_taught(where: str) -> None:
    torch._dynamo.reset()
    expected, model = ByHand(expert()), Student()
    fit(expected)
    if where == "inside":
        model.net = torch.compile(model.net, backend="eager")
        fit(model, Distillation(expert(), **LESSON))
        model.net = model.net._orig_mod
    else:
        fit(torch.compile(model, backend="eager"), Distillation(expert(), **LESSON))
    assert_close(model, expected)


class Checkpointed(Student):
    """Computes its layers again in the backward pass."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.net, inputs, use_reentrant=False)


def count(module: nn.Module) -> list[int]:
    """Return a list that grows by one with each forward pass of the module."""
    seen: list[int] = []
    module.register_forward_hook(lambda *call: seen.append(1))
    return seen


def test_what_a_backward_pass_computes_again_is_not_taught_again() -> None:
    teacher = expert()
    expected, model = ByHand(teacher), Checkpointed()
    for module in (expected, model):
        module.net[1] = nn.Identity()  # a batch norm would see each batch twice
    fit(expected)
    seen = count(teacher)
    fit(model, Distillation(teacher, network="net", **LESSON))
    assert len(seen) == 8
    assert_close(model, expected)


class Twice(Student):
    """Two forward passes in a step, each with a loss of its own, both before the first backward pass."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        losses = [self.loss(list(half)) for half in zip(*(tensor.split(4) for tensor in batch), strict=True)]
        self.optimizers().zero_grad()
        for loss in losses:
            (gradient,) = torch.autograd.grad(loss, self.net[0].weight, retain_graph=True)  # not to train with
            assert gradient.isfinite().all()
            self.manual_backward(loss)
        self.optimizers().step()


class TwiceByHand(Twice):
    loss = ByHand.loss

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.aside = (teacher.eval(), None)


def test_every_forward_pass_is_taught_where_its_own_loss_flows_back() -> None:
    expected, model = TwiceByHand(expert()), Twice()
    fit(expected)
    fit(model, Distillation(expert(), **LESSON))
    assert_close(model, expected)


# ------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_teacher_never_trains_and_is_no_part_of_the_model(precision: str) -> None:
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    torch.manual_seed(0)
    untaught = Student()
    fit(untaught, precision=precision, limit_val_batches=2, num_sanity_val_steps=2)
    after_untaught = torch.get_rng_state()
    torch.manual_seed(0)
    model = Student()
    keys, before, seen = list(model.state_dict()), copy.deepcopy(teacher.state_dict()), count(teacher)
    trainer = fit(model, Distillation(teacher), precision=precision, limit_val_batches=2, num_sanity_val_steps=2)
    assert torch.equal(after_untaught, torch.get_rng_state())
    assert len(seen) == 8, "one forward pass for each of the model in training, none in validation"
    after = teacher.state_dict()
    assert all(torch.equal(after[name], value.to(after[name].dtype)) for name, value in before.items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    ids = {id(parameter) for parameter in teacher.parameters()}
    assert not ids.intersection(id(p) for group in trainer.optimizers[0].param_groups for p in group["params"])
    assert_nothing_left(trainer, model, keys)


@pytest.mark.parametrize("first", ["pruning", "distillation"])
@pytest.mark.parametrize("start", [0, 2])
def test_the_dense_teacher_is_the_model_before_its_first_weight_is_pruned(start: int, first: str) -> None:
    before: dict[int, dict[str, Tensor]] = {}
    dense = Student()
    keep = On(on_train_batch_end=lambda trainer, module, *_: before.update({trainer.global_step: weights(module)}))
    before[0] = weights(dense)
    fit(dense, keep)
    pruning, distillation = MagnitudePruning(0.5, **{**PRUNING, "start": start}), Distillation()
    callbacks = [pruning, distillation] if first == "pruning" else [distillation, pruning]
    model = Student()
    levels: list[tuple[float, bool]] = []
    look = On(
        on_train_batch_end=lambda trainer, *_: levels.append(
            (pruning.sparsity_now, "distillation/loss" in trainer.callback_metrics)
        )
    )
    fit(model, *callbacks, look)
    assert levels[:start] == [(0.0, False)] * start, "nothing is taught before there is a teacher"
    assert levels[-1] == (0.5, True)
    saved = distillation.state_dict()["teacher"]
    # a linear schedule has its first zeros one update after its start
    at = start + 2 * (levels[start][0] == 0)
    assert all(torch.equal(saved[name], value) for name, value in before[at].items())


class Resumable(Student):
    def train_dataloader(self) -> Any:
        return Loader()

    def val_dataloader(self) -> Any:
        return Student().train_dataloader()


class Loader(StatefulLoader):
    """Three classes instead of numbers."""

    def __init__(self) -> None:
        super().__init__()
        inputs = self.data[0]
        self.data = (inputs, inputs[:, :3].argmax(1))


@pytest.mark.parametrize("teacher", ["dense", "module", "path"])
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(teacher: str, tmp_path: Path) -> None:
    torch.save(expert().state_dict(), tmp_path / "teacher.pt")
    teachers: dict[str, Any] = {"dense": "dense", "module": expert(), "path": str(tmp_path / "teacher.pt")}

    def callbacks() -> list[Any]:
        return [MagnitudePruning(0.5, **PRUNING), Distillation(teachers[teacher], **LESSON)]

    model = Resumable()
    save = On(on_train_batch_end=lambda trainer, *_: trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt"))
    fit(model, *callbacks(), save)
    for step in range(1, 8):
        again = Resumable(seed=step)
        fit(again, *callbacks(), ckpt_path=str(tmp_path / f"{step}.ckpt"))
        differ = [n for n, value in model.state_dict().items() if not torch.equal(again.state_dict()[n], value)]
        assert not differ, (step, differ)


def test_a_saved_teacher_is_read_from_a_checkpoint_or_a_state_dict(tmp_path: Path) -> None:
    teacher = expert()
    trainer = fit(teacher, max_epochs=0)
    trainer.strategy.connect(teacher)
    trainer.save_checkpoint(tmp_path / "lightning.ckpt")
    torch.save(teacher.state_dict(), tmp_path / "plain.pt")
    expected = Student()
    fit(expected, Distillation(teacher, **LESSON))
    for name in ("lightning.ckpt", "plain.pt"):
        model = Student()
        fit(model, Distillation(str(tmp_path / name), **LESSON))
        assert_close(model, expected, 0)


def test_copies_in_mid_run_keep_the_teacher_and_teach_nobody() -> None:
    copies: list[Any] = []
    teacher = expert()

    def take(trainer: Any, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 5:
            before = len(seen)
            copies.extend([copy.deepcopy(module), pickle.loads(pickle.dumps(distillation))])
            copies[0](torch.randn(4, 6))
            assert len(seen) == before, "the copy of the model has called the teacher"

    pruning, distillation, seen = MagnitudePruning(0.5, **PRUNING), Distillation(), count(teacher)
    fit(Student(), pruning, distillation, On(on_train_batch_end=take))
    kept, own = copies[1].state_dict()["teacher"], distillation.state_dict()["teacher"]
    assert all(torch.equal(kept[name], value) for name, value in own.items())


def test_another_model_gets_another_teacher() -> None:
    distillation = Distillation()
    fit(Student(), MagnitudePruning(0.5, **PRUNING), distillation)
    first = distillation.state_dict()["teacher"]
    fit(Student(seed=3), MagnitudePruning(0.5, **PRUNING), distillation)
    assert not torch.equal(first["net.0.weight"], distillation.state_dict()["teacher"]["net.0.weight"])


# ------------------------------------------------------------------------------------------- several ranks


class Pupil(distributed.Net):
    """A classifier. With DDP its training step, which returns a mapping, runs as its forward pass."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self(batch[0]), (batch[1][:, 0] > 0).long())}


def study(layout: distributed.Layout, teacher: str, accumulate: int) -> dict[str, Tensor]:
    model = Pupil(layout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        other = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4))
    pruning = MagnitudePruning(0.5, schedule="one_shot", start=2)
    distributed.fit(
        model,
        pruning,
        Distillation(other if teacher == "module" else "dense", **LESSON),
        accumulate_grad_batches=accumulate,
    )
    distributed.reshard(model)
    return {name: distributed.whole(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "teacher", "accumulate"), [("ddp", "dense", 1), ("ddp", "module", 2), ("fsdp", "module", 1)]
)
def test_two_ranks_learn_what_one_process_learns(layout: distributed.Layout, teacher: str, accumulate: int) -> None:
    alone = study("one", teacher, accumulate)
    untaught = Pupil()
    distributed.fit(untaught, MagnitudePruning(0.5, schedule="one_shot", start=2), accumulate_grad_batches=accumulate)
    assert (alone["net.6.weight"] - untaught.net[6].weight).abs().max() > 0.01
    both = run(study, 2, layout, teacher, accumulate)
    for found in both:
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- refusals


class Detached(Student):
    def loss(self, batch: list[Tensor]) -> Tensor:
        self(batch[0])
        return cross_entropy(self.net(batch[0]), batch[1])


class Silent(Student):
    def loss(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])


class Single(Student):
    def loss(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0]).square().mean()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)[:, :1]


def own_parameters() -> tuple[LightningModule, Distillation]:
    model = Student()
    return model, Distillation(model.net)


REFUSED: dict[str, tuple[Callable[[], tuple[LightningModule, Distillation]], str]] = {
    "temperature": (lambda: (Student(), Distillation(temperature=0)), "temperature must be above 0, got 0"),
    "weight": (lambda: (Student(), Distillation(weight=1.5)), r"weight must be in \(0, 1\], got 1.5"),
    "teacher": (lambda: (Student(), Distillation(3)), "teacher must be .* got 3"),
    "path": (lambda: (Student(), Distillation("nowhere.ckpt")), "teacher must be .* got no such file: nowhere.ckpt"),
    "layer": (lambda: (Student(), Distillation(layer="net.I")), "layer must .* got 'net.I'; close names: .'net."),
    "network": (lambda: (Student(), Distillation(network="nett")), "network must .* got 'nett'; close names: .'net"),
    "teacher's layer": (lambda: (Student(), Distillation(nn.Linear(6, 3), layer="net.1")), "layer must .* got 'net.1'"),
    "not pruned": (lambda: (Student(), Distillation()), "got no pruning callback in the Trainer"),
    "own": (own_parameters, "teacher must not share parameters with the model"),
    "shape": (lambda: (Student(), Distillation(nn.Linear(6, 4))), r"same shapes, got \[\(8, 4\)\] and \[\(8, 3\)\]"),
    "not called": (lambda: (Silent(), Distillation(expert())), r"must call self\(...\), .* such as one of \['net'\]"),
    "unused": (lambda: (Detached(), Distillation(expert())), "loss must depend on the output"),
    "one class": (lambda: (Single(), Distillation(Single())), r"at least two classes .* got the shape \(8, 1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fit(*make())


class Copying(Student):
    """What distillation alone amounts to, written by hand."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.aside = (teacher,)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return mse_loss(self.net(batch[0]), self.aside[0](batch[0]).detach())


def test_a_network_that_is_called_by_another_name_and_outputs_that_are_no_logits() -> None:
    teacher = nn.Linear(6, 3)
    expected, model = Copying(teacher), Silent()
    fit(expected)
    fit(model, Distillation(teacher, network="net", layer="", weight=1.0))
    assert_close(model, expected)


def test_a_model_that_is_pruned_already_is_no_dense_teacher(tmp_path: Path) -> None:
    fit(Student(), MagnitudePruning(0.5, **PRUNING)).save_checkpoint(tmp_path / "pruned.ckpt")
    with pytest.raises(ValueError, match="got a model that is pruned already"):
        fit(Student(), Distillation(), MagnitudePruning(0.5), ckpt_path=str(tmp_path / "pruned.ckpt"), max_epochs=3)


@pytest.mark.parametrize("first", ["pruning", "distillation"])
def test_callbacks_that_were_used_and_tested_before_begin_with_a_dense_model(first: str, tmp_path: Path) -> None:
    callbacks = [MagnitudePruning(0.5, **PRUNING), Distillation()]
    if first == "distillation":
        callbacks.reverse()
    trainer = fit(Student(), *callbacks)
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    trainer.validate(Student(), ckpt_path=str(tmp_path / "pruned.ckpt"), verbose=False)
    again, expected = Student(seed=3), Student(seed=3)
    fit(again, *callbacks)
    fit(expected, MagnitudePruning(0.5, **PRUNING), Distillation())
    assert_close(again, expected)


def test_all_of_it_is_parsed_from_yaml(tmp_path: Path) -> None:
    for teacher in ("dense", {"class_path": "torch.nn.Linear", "init_args": {"in_features": 6, "out_features": 3}}):
        path = tmp_path / "config.yaml"
        arguments = {"teacher": teacher, "temperature": 4.0, "layer": "" if isinstance(teacher, str) else None}
        entry = {"class_path": "lightning_prune.Distillation", "init_args": arguments}
        path.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
        cli = LightningCLI(
            MLP, args=["--config", str(path)], run=False, save_config_callback=None, trainer_defaults=QUIET
        )
        (found,) = [c for c in cli.trainer.callbacks if isinstance(c, Distillation)]
        assert found.teacher == "dense" or isinstance(found.teacher, nn.Linear)
        assert (found.temperature, found.layer) == (4.0, arguments["layer"])
