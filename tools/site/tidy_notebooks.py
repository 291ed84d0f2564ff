"""Executed notebooks without what the run and the machine add; takes no arguments."""

from __future__ import annotations

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def tidy(path: pathlib.Path) -> None:
    """Drop times, the kernel's version and a warning on progress bars from one notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        if cell["cell_type"] == "code":
            kept = [o for o in cell["outputs"] if "TqdmWarning" not in "".join(o.get("text", ""))]
            cell["outputs"] = kept  # a word on how bars are drawn, with the path of this machine
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}}
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        tidy(path)
