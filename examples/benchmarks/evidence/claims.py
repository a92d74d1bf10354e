"""What the papers claim, as pairs of settings, and the verdict on our runs."""

import statistics
from dataclasses import dataclass

from marked import spread
from running import Results, Setting
from scipy import stats

NEURONS = {"mnist": 0.9, "cnn": 0.5}  # the convolutions have few channels to spare


@dataclass(frozen=True)
class Claim:
    """One setting is better than another.

    Args:
        text: The claim, in a few words.
        source: The paper.
        one: The setting that should be better.
        other: The setting that it should beat.
        margin: How many points it may fall short.
        or_equal: Whether "not worse" is enough.
    """

    text: str
    source: str
    one: Setting
    other: Setting
    margin: float = 0.0
    or_equal: bool = False

    def judge(self, results: Results, seeds: range) -> list[str] | None:
        """Return a row of the table, or None if a run is missing; both runs of a seed share data and initialisation."""
        one, other = results.accuracies(self.one, seeds), results.accuracies(self.other, seeds)
        if one is None or other is None:
            return None
        gains = [a - b for a, b in zip(one, other, strict=True)]
        return [self.text, self.source, spread(one), spread(other), _signed(gains), self.verdict(gains)]

    def verdict(self, gains: list[float]) -> str:
        """Return the verdict of a one-sided paired t-test at 5 % on the gains."""
        p = float(stats.ttest_1samp([gain + self.margin for gain in gains], 0.0, alternative="greater").pvalue)
        if p < 0.05:
            return "holds"
        if p > 0.95:
            return "**the opposite holds**"
        return "holds: not worse" if self.or_equal else "**not significant**"


def _signed(gains: list[float]) -> str:
    return f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"


def _mnist(method: str) -> Setting:
    return Setting("mnist", method, 0.98)


def _rounds(method: str) -> Setting:
    return Setting("rounds", method, 0.98)


def _transfer(method: str) -> Setting:
    return Setting("transfer", method, 0.97)


def _neurons(method: str, task: str = "mnist") -> Setting:
    return Setting(task, f"neurons, {method}", NEURONS[task])


def _of_neurons(text: str, source: str, one: str, other: str) -> list[Claim]:
    """Return a claim about neurons, for a network without norms and for one with batch norms."""
    return [
        Claim(f"{kind}: {text}", source, _neurons(one, task), _neurons(other, task))
        for task, kind in (("mnist", "neurons"), ("cnn", "channels with batch norm"))
    ]


def _rest(method: str) -> Setting:
    return Setting("mnist", method, 0.995)


DENSE = Setting("mnist", "dense", 0.0)
CLAIMS = [
    Claim("gradual > one-shot", "Zhu and Gupta, 2017", _mnist("gradual"), _mnist("one-shot")),
    Claim("magnitude > random", "Han et al., 2015", _mnist("one-shot"), _mnist("one-shot, random")),
    Claim("ERK > uniform, static", "Evci et al., 2020", _mnist("static"), _mnist("static, uniform")),
    Claim("ERK > uniform, gradual", "Evci et al., 2020", _mnist("gradual, ERK"), _mnist("gradual, uniform")),
    Claim("SET > static", "Mocanu et al., 2018", _mnist("SET"), _mnist("static")),
    Claim("RigL >= SET", "Evci et al., 2020", _mnist("RigL"), _mnist("SET"), or_equal=True),
    Claim("SNIP > random, uniform", "Lee et al., 2019", _mnist("SNIP"), _mnist("static, uniform")),
    Claim("SNIP > random, ERK", "Lee et al., 2019", _mnist("SNIP"), _mnist("static")),
    Claim("GraSP > random, uniform", "Wang et al., 2020", _mnist("GraSP"), _mnist("static, uniform")),
    Claim("at 99.5 %, SynFlow > SNIP", "Tanaka et al., 2020", _rest("SynFlow"), _rest("SNIP")),
    Claim("at 99.5 %, LAMP > global, gradual", "Lee et al., 2021", _rest("gradual, LAMP"), _rest("gradual")),
    Claim("ADMM > gradual", "Lee et al., 2025", _mnist("ADMM"), _mnist("gradual")),
    Claim("at 99.5 %, ADMM > gradual", "Lee et al., 2025", _rest("ADMM"), _rest("gradual")),
    Claim(
        "in transfer, movement > magnitude", "Sanh et al., 2020", _transfer("gradual, movement"), _transfer("gradual")
    ),
    Claim(
        "rewound ticket > reinitialised ticket",
        "Frankle and Carbin, 2019",
        _rounds("LotteryTicket"),
        _rounds("LotteryTicket, random"),
    ),
    Claim(
        "learning-rate rewinding > fine-tuning",
        "Renda et al., 2020",
        _rounds("LotteryTicket, learning rate"),
        _rounds("iterative fine-tuning"),
    ),
    Claim("2:4 within 1 point of dense, `SRSTE`", "Zhou et al., 2021", Setting("mnist", "2:4, SRSTE", 0.5), DENSE, 1.0),
    Claim("2:4 within 1 point of dense, gradual", "", Setting("mnist", "2:4, gradual", 0.5), DENSE, 1.0),
    *_of_neurons("Taylor > random", "Molchanov et al., 2019", "Taylor", "random"),
    *_of_neurons("Taylor > L2", "Molchanov et al., 2019", "Taylor", "L2"),
    *_of_neurons("entropy, low first > random", "", "entropy, low first", "random"),
    *_of_neurons("entropy, low first > L2", "", "entropy, low first", "L2"),
    *_of_neurons("entropy, high first > random", "", "entropy, high first", "random"),
    *_of_neurons("entropy, high first > L2", "", "entropy, high first", "L2"),
]


def peers(task: str) -> list[tuple[Setting, Setting]]:
    """Return pairs of settings on a task: ours, and that of another library."""
    weights = {
        "ModelPruning, gradual": "gradual",
        "ModelPruning, one-shot": "one-shot",
        "torch.nn.utils.prune, one-shot": "one-shot",
        "fasterai, gradual": "gradual",
    }
    pairs = [(Setting(task, ours, 0.98), Setting(task, theirs, 0.98)) for theirs, ours in weights.items()]
    return [
        *pairs,
        (Setting(task, "neurons, L2", NEURONS["mnist"]), Setting(task, "Torch-Pruning, neurons", NEURONS["mnist"])),
    ]


PEERS = {"mnist": peers("mnist"), "fashion-10": peers("fashion-10")}
