"""Executed notebooks without what the run and the machine add, and their pictures that pages show;
takes no arguments."""

from __future__ import annotations

import base64
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


def copy_picture(name: str, notebook: str, number: int) -> None:
    """Keep a picture of a notebook in docs/, for a page that shows it."""
    text = (ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8")
    outputs = [o for c in json.loads(text)["cells"] for o in c.get("outputs", [])]
    drawn = [d for o in outputs if (d := o.get("data", {}).get("image/png"))]
    (ROOT / "docs" / name).write_bytes(base64.b64decode("".join(drawn[number])))


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        tidy(path)
    copy_picture("anchor_curve.png", "05_paper_preset", -1)
    copy_picture("few_labels.png", "07_few_labels", 0)
