"""A LightningCLI that is quick to build."""

from lightning.pytorch.cli import LightningCLI


class Fit(LightningCLI):
    """Knows one of the four subcommands, whose parsers take most of the time. ``test_readme.py`` has all of them."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the one subcommand, and the arguments that are not typed."""
        return {"fit": LightningCLI.subcommands()["fit"]}
