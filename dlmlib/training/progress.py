"""A progress bar that ends as one line of text, in a terminal and in a notebook."""

import sys

from tqdm import tqdm


class CellLine:
    """A file whose last line is shown in the notebook cell and replaces the one before.

    tqdm's own notebook bar is a widget. A stored notebook keeps it as a bar stuck at
    0 %; this keeps the last line: the steps, the time, the loss.
    """

    def __init__(self):
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.handle.update({"text/plain": line}, raw=True)

    def flush(self) -> None:
        """Nothing is held back."""


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def progress_bar(
    total: int, done: int = 0, show: bool = True, title: str = "training"
) -> tqdm:
    """A tqdm bar over steps; silent unless `show`. Introduced in notebook 02.

    Args:
        total: number of steps.
        done: steps made before this call.
        title: what is going on.
    """
    file = CellLine() if show and in_notebook() else None  # None: the terminal's stderr
    return tqdm(
        total=total, initial=done, desc=title, unit="step", file=file, disable=not show
    )
