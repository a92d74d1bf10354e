"""Tables for the pages: the verdict on each claim, the peers, and everything that was run."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from claims import CLAIMS, PEERS
from marked import replace, spread, table
from running import Results, Setting
from tasks import TASKS

STRATEGIES = {  # what the README says of each: the setting that was measured, what is pruned first, when to use it
    "`MagnitudePruning`": (Setting("mnist", "gradual", 0.98), "small weights, gradually", "by default"),
    "the same, one-shot": (Setting("mnist", "one-shot", 0.98), "small weights, one-shot", "trained models, short runs"),
    '`LotteryTicket`, `rewind="learning_rate"`': (
        Setting("rounds", "LotteryTicket, learning rate", 0.98),
        "small weights, in rounds",
        "accuracy first; six times the training",
    ),
    "`RigL`": (Setting("mnist", "RigL", 0.98), "small weights; others grow", "sparse from the first step"),
    "`PruningAtInit`": (Setting("mnist", "SNIP", 0.98), "by SNIP, before training", "the same, with fixed masks"),
    "`Magnitude(p=2)`, `Channel()`": (
        Setting("mnist", "neurons, L2", 0.9),
        "small neurons",
        "smaller and faster models",
    ),
    "`SensitivityPruning`": (
        Setting("mnist", "neurons, Taylor", 0.9),
        "neurons that matter least to the loss",
        "the same, with batch norms",
    ),
    "`RandomPruning`": (Setting("mnist", "neurons, random", 0.9), "neurons at random", "the baseline"),
    "`EntropyPruning`": (
        Setting("mnist", "neurons, entropy, high first", 0.9),
        "neurons with noisy outputs",
        "to find them",
    ),
}


def write(results: Results, seeds: range, root: Path, shaped: Sequence[str], levels: Sequence[float]) -> None:
    """Write the tables into the pages of the project at a root folder; one of them is of these methods and levels."""
    replace(root / "README.md", "strategies", strategies(results, seeds))
    replace(root / "docs" / "evidence.md", "claims", claims(results, seeds))
    replace(root / "docs" / "evidence.md", "peers", peers(results, seeds))
    replace(root / "docs" / "evidence.md", "grid", grid(results, seeds))
    replace(root / "docs" / "speed.md", "accuracy", shapes(results, seeds, shaped, levels))


def claims(results: Results, seeds: range) -> str:
    """Return the claims with both accuracies, their paired difference, and the verdict."""
    rows = [row for claim in CLAIMS if (row := claim.judge(results, seeds))]
    return table(["claim", "source", "left", "right", "difference", "verdict"], rows)


def strategies(results: Results, seeds: range) -> str:
    """Return the strategies in short, with their accuracy; neurons have a star, since fewer of them are pruned."""
    rows = []
    for name, (setting, first, when) in STRATEGIES.items():
        found = results.accuracies(setting, seeds)
        star = r"\*" if setting.method.startswith("neurons") else ""
        rows.append([name, first, when, f"{mean(found):.1f}{star}" if found else ""])
    dense = results.accuracies(Setting("mnist", "dense", 0.0), seeds)
    return table(["strategy", "prunes first", "use it for", f"accuracy (dense {mean(dense or [0]):.1f})"], rows)


def peers(results: Results, seeds: range) -> str:
    """Return the accuracies of other libraries next to ours."""
    parts = []
    for task, pairs in PEERS.items():
        rows = []
        for ours, theirs in pairs:
            found = [results.accuracies(setting, seeds) for setting in (ours, theirs)]
            if found[0] and found[1]:
                rows.append([_named(ours), spread(found[0]), _named(theirs), spread(found[1])])
        if rows:
            beside = table(["lightning_prune", "", "peer", ""], rows)
            parts.append(f"**{TASKS[task].title}**\n\n{beside}")
    return "\n\n".join(parts)


def grid(results: Results, seeds: range) -> str:
    """Return a table for each task, with a row per method and a column per sparsity."""
    parts = []
    for name, task in TASKS.items():
        complete = [s for s in dict.fromkeys(s for s, _ in results.rows) if results.accuracies(s, seeds)]
        settings = [setting for setting in complete if setting.task == name]
        dense = results.accuracies(Setting(name, "dense", 0.0), seeds)
        levels = sorted({setting.sparsity for setting in settings if setting.method != "dense"})
        rows = []
        for method in dict.fromkeys(setting.method for setting in settings if setting.method != "dense"):
            found = [results.accuracies(Setting(name, method, level), seeds) for level in levels]
            rows.append([method, *(spread(values) if values else "" for values in found)])
        title = f"{task.title}{f': dense {spread(dense)}' if dense else ''}"
        if rows:
            parts.append(f"**{title}**\n\n{table(['', *(f'{level:.1%}' for level in levels)], rows)}")
    return "\n\n".join(parts)


def shapes(results: Results, seeds: range, methods: Sequence[str], levels: Sequence[float]) -> str:
    """Return the accuracy of LeNet-300-100 by the shape of its zeros."""
    rows = []
    for method in methods:
        found = [results.accuracies(Setting("mnist", method, level), seeds) for level in levels]
        rows.append([method, *(spread(values) if values else "" for values in found)])
    return table(["accuracy", *(f"{level:.0%}" for level in levels)], rows)


def _named(setting: Setting) -> str:
    return f"{setting.method}, {setting.sparsity:.0%}"
