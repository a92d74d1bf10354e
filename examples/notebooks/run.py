"""Run the notebooks from top to bottom: `python examples/notebooks/run.py [--write] [name ...]`.

A cell that raises ends the run with its traceback. With --write, the outputs are saved in the notebooks.
"""

import argparse
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run(path: Path, write: bool) -> float:
    """Run a notebook in a kernel of its own, in its folder, and return the seconds."""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}})
    client.record_timing = False  # so that running again without a change in the results leaves the file as it was
    client.execute()
    if write:
        notebook.metadata.pop("widgets", None)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.validate(notebook)
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return time.perf_counter() - began


def main() -> None:
    """Run the named notebooks, or all of them."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks, without .ipynb; all by default")
    parser.add_argument("--write", action="store_true", help="save the outputs")
    args = parser.parse_args()
    os.environ.pop("MPLBACKEND", None)  # figures go into the notebook
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # progress bars need ipywidgets, which no notebook does
    paths = [FOLDER / f"{name}.ipynb" for name in args.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        print(f"{path.name}: {run(path, args.write):.0f} s", flush=True)


if __name__ == "__main__":
    main()
