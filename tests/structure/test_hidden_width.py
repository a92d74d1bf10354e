"""Channels of the residual stream go, with norms over those that are left: masked and shrunk models are the same."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from models import QUIET, Narrow, Residual, agrees, fit, weights, zeros
from models import size as count
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune import (
    ActivationNorm,
    Channel,
    Head,
    Layer,
    Pruning,
    PruningAtInit,
    Random,
    ResidualChannel,
    Sensitivity,
    load_shrunk,
    prune,
    save_compressed,
    save_fast,
    save_shrunk,
    sensitivity,
    shrink,
    sparsity,
)
from lightning_prune.models.forward import difference, run
from lightning_prune.models.kept_norms import KeptChannels, kept_channels
from lightning_prune.models.parameters import find
from lightning_prune.structure.cut_record import CutRecord

pytestmark = pytest.mark.slow
TOKENS = torch.randn(2, 3, 8, dtype=torch.float64)
IDS = torch.randint(0, 12, (2, 3))


class OwnNorm(nn.Module):
    """An RMSNorm as models of Hugging Face write it, here with a factor of one plus the weight, as in Gemma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Block(Residual):
    def __init__(self, norm: Any, last: bool) -> None:
        super().__init__(8, 2)
        self.first, self.second, self.last = norm(8), norm(8), last

    def forward(self, x: Tensor) -> Tensor:
        if not self.last:
            return super().forward(x)
        x = self.first(x + self.attention(x))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))


class Net(nn.Module):
    """Tokens or vectors, a position embedding, blocks with norms inside of their branches or behind them, classes."""

    def __init__(self, norm: Any = nn.LayerNorm, last: bool = False, tokens: bool = False) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(12, 8) if tokens else nn.Linear(8, 8)
        self.position = nn.Parameter(torch.randn(1, 3, 8))
        self.blocks = nn.ModuleList(Block(norm, last) for _ in range(2))
        self.norm, self.head = norm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, tuple[Any, Tensor]] = {
    "layer norms": (Net, TOKENS),
    "norms of sums": (partial(Net, last=True), TOKENS),
    "embedding": (partial(Net, tokens=True), IDS),
    "rms norms": (partial(Net, nn.RMSNorm), TOKENS),
    "own norms": (partial(Net, OwnNorm), TOKENS),
    "one factor": (partial(Net, partial(nn.LayerNorm, bias=False)), TOKENS),
}


def build(name: str) -> nn.Module:
    """Return a model in double precision, whose norms do something."""
    model = MODELS[name][0]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))
    return model


def pruned(model: nn.Module, inputs: Tensor, part: float = 0.375, **arguments: Any) -> nn.Module:
    given = {"criterion": Random(seed=1), "granularity": ResidualChannel(), "example_inputs": inputs, **arguments}
    prune(model, part, **given)
    return model


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_masked_and_shrunk_models_are_the_same(name: str, train: bool) -> None:
    inputs = MODELS[name][1]
    model = pruned(build(name), inputs).train(train)
    small = shrink(model, inputs).train(train)
    assert small.head.weight.shape == (3, 5)
    assert small.norm.weight.shape == (5,)
    assert not kept_channels(small)
    results = [each(inputs) for each in (model, small)]
    assert torch.allclose(*results, rtol=0.0, atol=1e-12)
    for result in results:
        result.square().sum().backward()
    own, left = (dict(each.named_parameters()) for each in (model, small))
    kept = own["head.weight"].any(0)
    assert torch.allclose(own["head.weight"].grad[:, kept], left["head.weight"].grad, atol=1e-12)
    assert torch.allclose(own["norm.weight"].grad[kept], left["norm.weight"].grad, atol=1e-12)
    assert not own["norm.weight"].grad[~kept].any()


def test_the_same_channels_go_everywhere_and_zeros_are_counted() -> None:
    model = build("embedding")
    masks = prune(model, 0.5, criterion=Random(), granularity=ResidualChannel(), example_inputs=IDS)
    kept = masks["norm.weight"]
    assert int(kept.sum()) == 4
    for name, mask in masks.items():
        found = [mask.movedim(dim, 0).reshape(8, -1).any(1) for dim, length in enumerate(mask.shape) if length == 8]
        assert any(alive.equal(kept) for alive in found), name
    assert masks["embed.weight"].all(0).equal(kept)
    assert masks["position"].all(1).all(0).equal(kept)
    assert agrees(model, masks)
    targets = [target.name for target in find(model)]
    assert (
        sparsity(model)
        == sum((~masks[name]).sum().item() for name in targets) / sum(masks[name].numel() for name in targets)
        == 0.5
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_the_same_model(copied: Any) -> None:
    model = pruned(Net(), TOKENS.float())
    again = copied(model)
    assert run(again, TOKENS.float()).equal(run(model, TOKENS.float()))
    assert difference(run(model, TOKENS.float()), run(shrink(again, TOKENS.float()), TOKENS.float())) < 1e-5
    assert model.state_dict().keys() == Net().state_dict().keys()


def test_half_precision_stays() -> None:
    model, inputs = pruned(Net(), TOKENS.float()).bfloat16(), TOKENS.bfloat16()
    assert model(inputs).dtype == torch.bfloat16
    assert shrink(model, inputs)(inputs).dtype == torch.bfloat16


def test_weights_alone_are_not_the_model_and_are_not_cut() -> None:
    model = pruned(build("layer norms"), TOKENS)
    plain = build("layer norms")
    plain.load_state_dict(model.state_dict())
    assert difference(run(model, TOKENS), run(plain, TOKENS)) > 1e-3
    with pytest.warns(UserWarning, match="zero and stay in the model.* as behind a norm over all of them"):
        assert shrink(plain, TOKENS).head.weight.shape == (3, 8)


def test_weights_are_not_saved_alone(tmp_path: Path) -> None:
    model = pruned(build("layer norms"), TOKENS, granularity=Channel())
    model = pruned(shrink(model, TOKENS), TOKENS)
    with pytest.raises(ValueError, match=r"must be shrunk before its weights are saved alone.*blocks\.0\.first"):
        save_shrunk(model, tmp_path / "small.pt")
    with pytest.raises(ValueError, match="must be shrunk before"):
        save_compressed(model, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="must be shrunk before"):
        save_fast(model, tmp_path / "small.pt")
    save_shrunk(shrink(model, TOKENS), tmp_path / "small.pt")


def test_a_second_cut_goes_on_from_the_first_with_other_units(tmp_path: Path) -> None:
    model = build("layer norms")
    for granularity in (ResidualChannel(), Channel(), Layer(), Head(), ResidualChannel()):
        pruned(model, TOKENS, 0.4, granularity=granularity)
        small = shrink(model, TOKENS)
        assert difference(run(model, TOKENS), run(small, TOKENS)) < 1e-10
        model = small
    assert model.head.weight.shape == (3, 3)
    save_shrunk(model, tmp_path / "small.pt")
    loaded = load_shrunk(partial(build, "layer norms"), tmp_path / "small.pt")
    assert run(loaded, TOKENS).equal(run(model, TOKENS))


def test_masks_of_all_kinds_are_cut_together() -> None:
    model = build("own norms")
    for granularity in (Channel(), ResidualChannel(), Head(), Layer()):
        pruned(model, TOKENS, 0.5, granularity=granularity)
    small = shrink(model, TOKENS)
    assert difference(run(model, TOKENS), run(small, TOKENS)) < 1e-10
    assert small.norm.weight.shape == (4,)
    assert len(small.blocks) == 1
    assert small.blocks[0].attention.q.weight.shape == (4, 4)


def test_rounds_and_multiples_and_goals() -> None:
    model = pruned(build("rms norms"), TOKENS, 0.7, granularity=ResidualChannel(round_to=3), rounds=2)
    assert int(kept_channels(model)["norm.weight"].sum()) == 3
    assert shrink(model, TOKENS, round_to=4).norm.weight.shape == (3,)  # padding would change the statistics
    model = build("rms norms")
    total = sum(parameter.numel() for parameter in model.parameters())
    pruned(model, TOKENS, 0.3, of="parameters")
    small = shrink(model, TOKENS)
    assert sum(parameter.numel() for parameter in small.parameters()) <= 0.7 * total


def test_what_is_left_out_has_a_reason() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    with pytest.raises(ValueError, match=r"ResidualChannel\(minimum=1, round_to=1\) must find a residual stream"):
        pruned(encoder, TOKENS.float())
    with pytest.raises(ValueError, match=r"0\.weight: its channels are no residual stream"):
        pruned(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), TOKENS.float())
    model = Net()
    model.head = nn.Identity()
    with pytest.raises(ValueError, match="its channels are outputs of the model"):
        pruned(model, TOKENS.float())
    model = Net(partial(nn.GroupNorm, 2))
    model.forward = lambda x: model.head(model.norm((model.embed(x) + model.position).mT).mT)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="got none"):
        pruned(model, TOKENS.float())
    model = Net()
    model.position.requires_grad = False
    with pytest.raises(ValueError, match="what depends on it is frozen: position"):
        pruned(model, TOKENS.float())
    with pytest.raises(ValueError, match=r"up too|down\.weight too, which is not among the targets"):
        pruned(Net(), TOKENS.float(), ignore=["blocks.1.down.*"])
    with pytest.raises(ValueError, match="needs example inputs"):
        pruned(Net(), None)
    with pytest.raises(ValueError, match="sequential must be None"):
        prune(
            Net(),
            0.5,
            criterion=ActivationNorm(),
            granularity=ResidualChannel(),
            example_inputs=TOKENS.float(),
            data=[TOKENS.float()],
            sequential="blocks",
        )


# ------------------------------------------------------------------------------------------------ the criterion


def test_the_score_is_the_mean_absolute_value_summed_over_norms() -> None:
    model = build("layer norms")
    seen: dict[str, list[Tensor]] = {}
    handles = [
        norm.register_forward_hook(lambda m, a, out, name=name: seen.setdefault(name, []).append(out.detach()))
        for name, norm in model.named_modules()
        if isinstance(norm, nn.LayerNorm)
    ]
    data = [TOKENS, torch.randn(4, 3, 8, dtype=torch.float64)]
    for batch in data:
        run(model, batch)
    for handle in handles:
        handle.remove()
    scores = sum(torch.cat([out.flatten(0, 1) for out in outputs]).abs().mean(0) for outputs in seen.values())
    masks = prune(
        model, 0.5, criterion=ActivationNorm(), granularity=ResidualChannel(), data=data, example_inputs=TOKENS
    )
    assert set((~masks["norm.weight"]).nonzero().flatten().tolist()) == set(scores.argsort()[:4].tolist())


def test_other_units_have_no_such_score() -> None:
    with pytest.raises(ValueError, match=r"no norm takes statistics over it: use granularity=ResidualChannel\(\)"):
        prune(Net(), 0.5, criterion=ActivationNorm(), granularity=Channel(), data=[TOKENS.float()])


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("criterion", [ActivationNorm(window=2), Sensitivity(window=2), Random()])
def test_after_training_masked_and_shrunk_agree(criterion: Any, optimizer: Any) -> None:
    model = Narrow(optimizer=optimizer)
    callback = Pruning(0.5, criterion, ResidualChannel(), start=2, end=5, frequency=1)
    fit(model, callback)
    assert callback.sparsity_now == zeros(model) / count(model) == 0.5
    assert set(weights(model)) <= callback.masks.keys()
    for train in (True, False):
        model.train(train)
        small = shrink(model, model.example)
        assert difference(model(model.example), small(model.example)) < 1e-5
    assert small.net[4].weight.shape == (4,)


def test_training_is_that_of_the_small_model() -> None:
    model = Narrow().double()
    model.example_input_array = model.example.double()
    prune(model, 0.5, criterion=Random(), granularity=ResidualChannel())
    small = shrink(model)
    data = [batch[0].double() for batch in model.train_dataloader()]
    for each in (model, small):
        optimizer = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        for batch in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(batch), torch.arange(8) % 3).backward()
            optimizer.step()
            # with no masks enforced: what the norms do not see has no gradient
    assert difference(model(data[0]), small(data[0])) < 1e-10


@pytest.mark.parametrize("example", [False, True])
def test_what_is_validated_is_the_small_model_also_from_a_checkpoint(example: bool, tmp_path: Path) -> None:
    def parts() -> tuple[Narrow, Pruning]:
        model = Narrow(dropout=0.3)
        model.example_input_array = model.example if example else None
        return model, Pruning(0.5, ActivationNorm(window=2), ResidualChannel(), start=2, end=5, frequency=1)

    model, callback = parts()
    trainer = fit(model, callback, limit_val_batches=4)
    loss = trainer.callback_metrics["val_loss"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    small = shrink(model, model.example)
    again, restored = parts()
    for stage in ("validate", "test"):
        again.test_step, again.test_dataloader = again.validation_step, again.val_dataloader  # type: ignore[attr-defined]
        evaluating = Trainer(**{**QUIET, "limit_val_batches": 4}, callbacks=[restored])
        getattr(evaluating, stage)(again, ckpt_path=tmp_path / "last.ckpt", verbose=False)
        assert evaluating.callback_metrics["val_loss"] == loss
    assert difference(run(again, again.example), run(small, again.example)) < 1e-5
    alone = Trainer(**QUIET, callbacks=[])
    alone.validate(small, verbose=False)
    assert alone.callback_metrics["val_loss"].isfinite()


def test_a_run_cuts_the_width_when_it_ends() -> None:
    model = Narrow()
    average = AveragedModel(model)
    callback = Pruning(0.5, granularity=ResidualChannel(), start=1, end=4, frequency=1, shrink_at_end=True)
    trainer = fit(model, callback)
    assert model.net[0].weight.shape == (4, 8)
    assert not any(KeptChannels.of(module) for module in model.modules())
    assert set(trainer.optimizers[0].param_groups[0]["params"]) == set(model.parameters())
    assert all(mask.all() for mask in callback.masks.values())
    assert average.module.net[0].weight.shape == (8, 8)
    fit(model, Pruning(0.5, granularity=ResidualChannel(), start=1, end=4))
    assert model.net[0].weight.shape == (4, 8)


def test_averages_and_optimizers_are_cut_alike() -> None:
    model = Narrow()
    average = AveragedModel(model)
    model.example_input_array = model.example
    masks = prune(model, 0.5, criterion=Random(), granularity=ResidualChannel())
    optimizer = torch.optim.Adam(model.parameters())
    model(model.example).sum().backward()
    optimizer.step()
    masks.apply(model)
    average.update_parameters(model)
    shrink(model, inplace=True, optimizers=[optimizer], averages=[average])
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert model.net[0].weight.shape == (4, 8)
    optimizer.step()


def test_compiled_code_sees_the_norms_that_changed() -> None:
    model = Narrow()
    compiled, function = torch.compile(model, backend="eager"), torch.compile(model.net.forward, backend="eager")
    for run_compiled in (compiled, function):
        run_compiled(model.example)
    prune(compiled, 0.5, criterion=Random(), granularity=ResidualChannel(), example_inputs=model.example)
    for run_compiled in (compiled, function):
        assert difference(model(model.example), run_compiled(model.example)) < 1e-6
    assert difference(shrink(model, model.example)(model.example), compiled(model.example)) < 1e-5


# ------------------------------------------------------------------------------------------------ records


def test_a_record_says_whether_a_config_states_the_width() -> None:
    first, second = CutRecord(hidden=(8, 6)), CutRecord(hidden=(6, 4))
    assert first.then(second).hidden == (8, 4)
    assert first.then(CutRecord()).hidden == CutRecord().then(first).hidden == (8, 6)
    assert CutRecord.from_state_dict(first.state_dict()).hidden == (8, 6)
    assert "hidden" not in CutRecord().state_dict()
    with pytest.raises(ValueError, match="hidden"):
        CutRecord.from_state_dict({**first.state_dict(), "hidden": [8]})


def test_what_is_pruned_at_initialisation_is_the_small_model() -> None:
    model = Narrow()
    callback = PruningAtInit(0.5, granularity=ResidualChannel())
    fit(model, callback)
    assert callback.sparsity_now == 0.5
    small = shrink(model, model.example)
    assert small.net[0].weight.shape == (4, 8)
    assert difference(run(model, model.example), run(small, model.example)) < 1e-5


def test_the_width_has_no_sensitivity_of_single_layers() -> None:
    with pytest.raises(ValueError, match="granularity must have units of single layers, got ResidualChannel"):
        sensitivity(Narrow(), None, lambda model: 0.0, granularity=ResidualChannel())
