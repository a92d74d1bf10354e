"""Lottery tickets: what is rewound is what was there at step k, bit by bit, and after the last round nothing is."""

import copy
import re
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import BATCHES, MLP, ConvNet, MaskRecorder, On, TwoOptimizers, agrees, fit, size, weights, zeros
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_prune import Channel, LotteryTicket, Movement, Random, Units

STEPS = 3 * BATCHES  # with two rounds, three trainings of one epoch each


class Scheduled(MLP):
    """With a learning rate that falls in every step, and other schedules that follow epochs and the loss."""

    logs_loss = True

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        schedulers = [
            {"scheduler": LambdaLR(optimizer, lambda step: 0.9**step), "interval": "step"},
            {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"},
            {"scheduler": ReduceLROnPlateau(optimizer), "interval": "epoch", "monitor": "loss"},
        ]
        return [optimizer], schedulers


def everything(trainer: Trainer, model: nn.Module) -> dict[str, Any]:
    """Copies of all that a run changes."""
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }
    )


class Diary(MaskRecorder):
    """Writes down, at the start of every batch, everything that a run changes, and the masks."""

    def __init__(self, callback: LotteryTicket) -> None:
        super().__init__(callback)
        self.pages: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: nn.Module, *args: Any) -> None:
        self.record()
        self.pages.append(everything(trainer, pl_module))


def equal(one: Any, other: Any) -> bool:
    """Whether two nested states are the same, bit by bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def masked(state: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value * masks[name] if name in masks else value for name, value in state.items()}


def write(callback: LotteryTicket, model: nn.Module | None = None, **trainer_kwargs: Any) -> Diary:
    diary = Diary(callback)
    fit(model or Scheduled(), callback, diary, **{"max_epochs": 3, "limit_val_batches": 0, **trainer_kwargs})
    return diary


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("rewind_to", [0, 1, BATCHES - 1])
def test_everything_is_as_it_was_at_the_step(rewind_to: int, interval: str) -> None:
    model = Scheduled()
    diary = write(LotteryTicket(0.75, rounds=2, rewind_to=rewind_to, interval=interval), model)
    then, apart = diary.pages[rewind_to], BATCHES if interval == "epoch" else BATCHES - rewind_to
    for begin in (BATCHES, BATCHES + apart):  # after each of the two rounds
        now, masks = diary.pages[begin], diary.masks[begin]
        assert equal(now["model"], masked(then["model"], masks))
        assert equal(now["optimizers"], then["optimizers"])
        # a schedule that follows a metric is stepped once more by the epoch that ends with a round counted in steps
        assert equal(now["schedulers"][:2], then["schedulers"][:2])
        assert interval == "step" or equal(now["schedulers"][2], then["schedulers"][2])
        # where epochs count, the same batch of an epoch follows the step as it did then
        again = begin + rewind_to if interval == "epoch" else begin
        assert equal(diary.pages[again]["model"], now["model"])
        assert equal(diary.pages[again]["optimizers"], now["optimizers"])
        assert len(diary.pages) == again + 1 or not equal(diary.pages[again + 1]["model"], now["model"])
    assert [int(sum((~mask).sum() for mask in masks.values())) for masks in diary.masks] == [
        *[0] * BATCHES,
        *[79] * apart,  # half of 158
        *[118] * (apart + 1),  # and half of what was left
    ]
    assert not equal(dict(model.state_dict()), masked(then["model"], diary.masks[-1])), "rewound at the end"
    assert zeros(model) == round(0.75 * size(model))


def test_each_training_is_the_one_before_under_fewer_weights() -> None:
    """A ticket that prunes nothing of what is left would repeat itself: with a level near 0, the first steps do."""
    diary = write(LotteryTicket(0.001, rounds=2, scope="local"))  # rounds to no weight at all
    assert zeros(MLP()) == 0
    for step in range(1, BATCHES):
        assert equal(diary.pages[step], diary.pages[BATCHES + step])
        assert equal(diary.pages[step], diary.pages[2 * BATCHES + step])


def test_the_epoch_schedule_at_the_end_of_an_epoch_has_been_stepped() -> None:
    """Going back to the last step of an epoch goes back to the start of the next one."""
    diary = write(LotteryTicket(0.75, rounds=1, rewind_to=BATCHES, frequency=2), max_epochs=3)
    then, now = diary.pages[BATCHES], diary.pages[2 * BATCHES]
    assert equal(now["schedulers"], then["schedulers"])
    assert equal(now["optimizers"], then["optimizers"])
    assert then["schedulers"][1]["last_epoch"] == 1


def test_learning_rate_rewinding_keeps_the_weights() -> None:
    callback = LotteryTicket(0.75, rounds=2, rewind="learning_rate", rewind_to=1)
    before: list[Any] = []
    look = On(on_train_epoch_end=lambda trainer, module: before.append(everything(trainer, module)))
    diary = Diary(callback)
    fit(Scheduled(), callback, diary, look, max_epochs=3, limit_val_batches=0)
    for epoch in (1, 2):
        now = diary.pages[epoch * BATCHES]
        assert equal(now["model"], masked(before[epoch - 1]["model"], diary.masks[epoch * BATCHES]))
        assert equal(now["optimizers"], diary.pages[1]["optimizers"])
        assert equal(now["schedulers"], diary.pages[1]["schedulers"])
    assert not callback.state_dict()["memory"]["tensors"]


def test_the_control_has_the_masks_of_the_ticket_and_other_weights() -> None:
    ticket, control = (write(LotteryTicket(0.75, rounds=2, rewind=how, rewind_to=1)) for how in ("weights", "random"))
    for step in range(2 * BATCHES):
        assert equal(ticket.pages[step], control.pages[step])
    assert equal(ticket.masks[2 * BATCHES], control.masks[2 * BATCHES])
    found, other = ticket.pages[2 * BATCHES], control.pages[2 * BATCHES]
    for name, mask in control.masks[2 * BATCHES].items():
        assert not other["model"][name][~mask].any()
        assert not (found["model"][name] == other["model"][name])[mask].any()
    assert equal(other["model"]["net.1.running_mean"], torch.zeros(8))
    assert equal(found["schedulers"], other["schedulers"])
    assert found["optimizers"][0]["state"]
    assert not other["optimizers"][0]["state"]


def test_the_control_is_drawn_by_its_seed() -> None:
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(starts))
        diary = write(LotteryTicket(0.75, rounds=2, rewind="random", seed=seed))
        starts.append(diary.pages[2 * BATCHES]["model"])
    assert equal(starts[0], starts[1])
    assert not equal(starts[0], starts[2])


def test_the_control_does_not_draw_the_weights_that_the_same_seed_has_drawn() -> None:
    # MLP draws its weights with seed 0, in the order of its modules
    diary = write(LotteryTicket(0.75, rounds=1, rewind="random", seed=0, frequency=1), max_epochs=2)
    begin, again = diary.pages[0]["model"], diary.pages[BATCHES]["model"]
    for name, mask in diary.masks[BATCHES].items():
        assert not (begin[name] == again[name])[mask].any()


class Annealed(MLP):
    """With a schedule that spans one training, and raises after it; and the learning rates that it trained with."""

    def __init__(self, steps: int, schedule: str) -> None:
        super().__init__()
        self.steps, self.schedule = steps, schedule
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        made = {
            "onecycle": lambda: OneCycleLR(optimizer, 0.1, total_steps=self.steps),
            "cosine": lambda: CosineAnnealingLR(optimizer, self.steps),
            "epochs": lambda: CosineAnnealingLR(optimizer, self.steps // BATCHES),
        }[self.schedule]()
        return [optimizer], [{"scheduler": made, "interval": "epoch" if self.schedule == "epochs" else "step"}]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "epochs"])
@pytest.mark.parametrize(("interval", "rewind_to"), [("step", 3), ("epoch", 3), ("epoch", 4), ("epoch", 5)])
def test_a_training_goes_from_the_step_to_its_end(interval: str, rewind_to: int, schedule: str) -> None:
    steps = 3 * BATCHES
    model = Annealed(steps, schedule)
    fit(model, LotteryTicket(0.75, rounds=2, rewind_to=rewind_to, interval=interval), max_epochs=9, limit_val_batches=0)
    first, rest = model.rates[:steps], rewind_to % BATCHES if interval == "epoch" else 0
    later = steps - rewind_to + rest  # what is trained twice, until the batch of an epoch is that of the step
    assert len(model.rates) == steps + 2 * later
    for begin in (steps, steps + later):
        found = model.rates[begin + rest : begin + later]
        if interval == "epoch" or schedule != "epochs":  # otherwise epochs end elsewhere
            assert found == pytest.approx(first[rewind_to:])
    assert schedule == "epochs" or model.rates[-1] == pytest.approx(min(first), abs=1e-6)


def test_a_run_that_is_longer_than_its_rounds_trains_the_ticket_on() -> None:
    callback = LotteryTicket(0.75, rounds=2, rewind_to=1, frequency=2, interval="step")
    assert fit(MLP(), callback, max_epochs=3, limit_val_batches=0).global_step == 3 * BATCHES
    assert callback.plan(2, 4) == [(2, 0.5), (3, 1.0)]


def test_a_ticket_that_is_trained_is_not_trained_on_when_it_is_resumed(tmp_path: Any) -> None:
    callback = LotteryTicket(0.75, rounds=2, rewind_to=1, frequency=4, interval="step")
    trainer = fit(MLP(), callback, max_epochs=3, limit_val_batches=0)
    assert trainer.global_step == 3 * BATCHES - 2
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = LotteryTicket(0.75, rounds=2, rewind_to=1, frequency=4, interval="step")
    ended = fit(MLP(), again, max_epochs=3, limit_val_batches=0, ckpt_path=str(tmp_path / "end.ckpt"))
    assert ended.global_step == trainer.global_step
    assert fit(trainer.model, callback, max_epochs=3).global_step == 3 * BATCHES, "a fit of its own"


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_each_round_keeps_the_same_part_of_what_is_left(rounds: int) -> None:
    callback, model = LotteryTicket(0.9, rounds=rounds, frequency=2, interval="step"), ConvNet()
    diary = Diary(callback)
    fit(model, callback, diary, max_steps=2 * rounds + 2, max_epochs=9, limit_val_batches=0)
    total, part = size(model), 0.1 ** (1 / rounds)
    due = [round((1 - part**done) * total) for done in range(rounds + 1)]
    assert [sum(int((~m).sum()) for m in masks.values()) for masks in diary.masks[:-1:2]] == due
    assert due[-1] == round(0.9 * total) == zeros(model)
    assert agrees(model, callback.masks)


def test_every_layer_ends_at_its_own_sparsity_and_in_units_of_a_granularity() -> None:
    model, callback = MLP(), LotteryTicket({"net.0.*": 0.3, "*": 0.7}, rounds=2)
    fit(model, callback, max_epochs=3, limit_val_batches=0)
    assert {name: int((w == 0).sum()) for name, w in weights(model).items()} == {
        "net.0.weight": 14,
        "net.4.weight": 56,
        "net.6.weight": 21,
    }
    model, callback = (
        MLP(),
        LotteryTicket(0.5, rounds=2, granularity=Channel(), criterion=Random(), ignore=("net.6.*",)),
    )
    fit(model, callback, max_epochs=3, limit_val_batches=0)
    assert sum(int((~weight.any(1)).sum()) for weight in weights(model).values()) == 9


def test_two_optimizers_stepped_by_hand_are_rewound() -> None:
    diary = write(LotteryTicket(0.75, rounds=2, rewind_to=1), TwoOptimizers())
    for begin in (BATCHES, 2 * BATCHES):
        assert equal(diary.pages[begin]["model"], masked(diary.pages[1]["model"], diary.masks[begin]))
        assert equal(diary.pages[begin]["optimizers"], diary.pages[1]["optimizers"])


def test_what_is_remembered_is_nobody_elses() -> None:
    callback = LotteryTicket(0.75, rounds=2, rewind_to=1)
    memories = []
    keep = On(on_train_batch_end=lambda *args: memories.append(callback.state_dict()["memory"]))
    first: list[Any] = []
    take = On(on_train_batch_end=lambda *args: first or first.append(copy.deepcopy(callback.state_dict()["memory"])))
    fit(Scheduled(), callback, keep, take, max_epochs=3, limit_val_batches=0)
    assert all(equal(memory, first[0]) for memory in memories)
    assert first[0]["tensors"].keys() >= {
        "net.0.weight",
        "net.0.bias",
        "net.1.running_mean",
        "net.1.num_batches_tracked",
    }


def test_the_target_is_reached_when_the_ticket_is_there() -> None:
    callback = LotteryTicket(0.75, rounds=2)
    reached: list[bool] = []
    fit(MLP(), callback, On(on_train_epoch_end=lambda *args: reached.append(callback.reached)), max_epochs=3)
    assert reached == [False, False, True]


def test_a_callback_that_came_later_says_where_it_rewinds_to(tmp_path: Any) -> None:
    fit(MLP(), max_epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    callback = LotteryTicket(0.75, rounds=1)
    with pytest.warns(UserWarning, match="LotteryTicket was not there at step 0: it will rewind to step 4"):
        fit(MLP(), callback, ckpt_path=str(tmp_path / "dense.ckpt"), max_epochs=4)
    assert callback.sparsity_now == pytest.approx(0.75, abs=1 / 158)


class Lazy(MLP):
    """Its first layer gets its shape from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.LazyLinear(8)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:The total number of parameters")
def test_layers_without_a_shape_are_rewound_to_a_step_that_they_have_one_at() -> None:
    with pytest.raises(ValueError, match="the model must have no uninitialised parameters to be rewound to its start"):
        fit(model := Lazy(), LotteryTicket(0.75, rounds=2), max_epochs=3)
    assert model.trainer.global_step == 0
    model = Lazy()
    fit(model, LotteryTicket(0.75, rounds=2, rewind_to=1), max_epochs=3)
    assert zeros(model) == round(0.75 * size(model))


class Unresettable(MLP):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 90}, "sparsity must be in [0, 1), got 90"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rewind": "all"}, 'rewind must be "weights", "learning_rate" or "random", got \'all\''),
        ({"rewind_to": -1}, "rewind_to must be an int of at least 0 or a float in [0, 1], got -1"),
        ({"rewind_to": 1.5}, "rewind_to must be an int of at least 0 or a float in [0, 1], got 1.5"),
        ({"frequency": 0}, "frequency must be at least 1 epoch, got 0"),
    ],
)
def test_the_impossible_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LotteryTicket(**{"sparsity": 0.9, **arguments})


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        ({"rounds": 4}, MLP, "rounds must fit into the run, with at least one epoch for each of the 5 trainings"),
        ({"rounds": 2, "rewind_to": 4}, MLP, "rewind_to must lie before the first round ends, got step 4 of 4"),
        ({"rounds": 2, "rewind_to": 0.5}, MLP, "rewind_to must lie before the first round ends, got step 6 of 4"),
        ({"rounds": 2, "rewind": "random"}, Unresettable, "must have reset_parameters to be initialised again"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_its_first_step(
    arguments: dict[str, Any], model: type[MLP], message: str
) -> None:
    started: list[int] = []
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(
            model(),
            LotteryTicket(0.9, **arguments),
            On(on_train_batch_start=lambda *args: started.append(1)),
            max_epochs=3,
        )
    assert not started


def test_a_run_of_unknown_length_needs_a_frequency() -> None:
    with pytest.raises(ValueError, match=r"frequency must be given where the length of the run is unknown, got None"):
        fit(MLP(), LotteryTicket(0.9), max_epochs=-1, max_steps=20)
    callback = LotteryTicket(0.9, rounds=2, frequency=1)
    fit(MLP(), callback, max_epochs=-1, max_steps=STEPS)
    assert callback.reached


def test_a_run_that_is_too_short_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="LotteryTicket (will not reach its target|ended at a sparsity)"):
        fit(MLP(), LotteryTicket(0.9, rounds=3, frequency=1), max_epochs=2)


def test_what_adds_up_over_updates_starts_over_where_training_is_undone() -> None:
    seen: list[int] = []

    class Watched(Movement):
        def scores(self, units: Units) -> Tensor:
            seen.append(units.steps)
            return super().scores(units)

    ticket = LotteryTicket(0.75, rounds=2, criterion=Watched(window=3), targets=("net.4.*",))
    fit(MLP(), ticket, max_epochs=3)
    assert set(seen) == {3}
