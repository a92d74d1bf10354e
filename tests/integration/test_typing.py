"""Typing: a user's code that type checks with mypy's strict settings is what the README and the pages show."""

import re
from pathlib import Path

import pytest
from mypy import api
from pages import needs
from test_docs import PAGES, blocks

import lightning_prune

ROOT = Path(lightning_prune.__file__).parents[1]
# beside those of make lint: what no signature of the README needs is not read, which saves two thirds of the time
UNREAD = """
[[tool.mypy.overrides]]
follow_imports = "skip"
module = [
    "matplotlib.*", "numpy.*", "scipy.*", "sympy.*", "torchmetrics.*", "transformers.*", "torch._decomp.*",
    "torch._dynamo.*", "torch._export.*", "torch._functorch.*", "torch._higher_order_ops.*", "torch._inductor.*",
    "torch._prims.*", "torch._refs.*", "torch._subclasses.*", "torch.export.*", "torch.fx.*", "torch.onnx.*",
    "torch.testing.*",
]
"""
# The code of the pages is written as in a notebook: names are bound again, and the types of layers are not known.
NOTEBOOKS = """
[[tool.mypy.overrides]]
disable_error_code = [
    "assignment", "import-not-found", "import-untyped", "index", "no-redef", "operator", "union-attr",
]
disallow_any_generics = false
disallow_untyped_calls = false
disallow_untyped_defs = false
module = [{}]
"""
MISTAKES = """
from lightning_prune import MagnitudePruning, Pruning, RigL

MagnitudePruning(0.9, sechedule="linear")
MagnitudePruning(0.9, schedule="quadratic")
RigL(0.9, scope="layer")
Pruning(0.9, criterion="magnitude")
Pruning(0.9, targets=[1])
"""


@pytest.mark.timeout(600)  # without a cache mypy reads all of PyTorch
def test_the_readme_passes_mypy_and_mistakes_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    for number, block in enumerate(code):
        if not needs(block):
            (tmp_path / f"readme_{number}.py").write_text(block)
    pages = []
    for name, path in PAGES.items():
        page = [text for language, text in blocks(path) if language == "python"]
        if page and not any(map(needs, page)):
            pages.append(f"page_{re.sub(r'[^a-z]', '_', name.removesuffix('.md'))}")
            (tmp_path / f"{pages[-1]}.py").write_text(
                "\n".join(page).replace("QUIET =", "QUIET: dict =").replace("settings =", "settings: dict =")
            )
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    settings = tmp_path / "pyproject.toml"
    settings.write_text((ROOT / "pyproject.toml").read_text() + UNREAD + NOTEBOOKS.format(str(pages)[1:-1]))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    files = map(str, sorted(tmp_path.glob("*.py")))
    cache = ROOT / ".mypy_cache" / "readme"
    found, errors, _ = api.run(["--config-file", str(settings), "--cache-dir", str(cache), *files])
    assert not errors
    wrong = re.findall(r"\b(readme_\d+|page_\w+|mistakes)\.py:(\d+): error:", found)
    assert wrong == [("mistakes", line) for line in "45678"], found
