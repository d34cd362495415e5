"""Draw data/denoising.png, the picture of the README: `make picture`."""

from pathlib import Path

import torch
from matplotlib import pyplot as plt

import dlmlib as dlm
from dlmlib import show
from dlmlib.tasks.grammar import Grammar

ROOT = Path(__file__).resolve().parents[1]
SEED = 35  # a long sentence with a relative clause


def main() -> None:
    grammar = Grammar()
    model, tokenizer = dlm.load("grammar", device="cpu")
    start = torch.tensor([[tokenizer.bos_token_id]])
    out = dlm.decode(
        model,
        start,
        length=grammar.length - 1,
        propose="entropy",
        temperature=1.0,
        generator=dlm.generator(SEED),
        trace=True,
    )
    if not grammar.grammatical(out.sequences).all():
        raise SystemExit("the model changed: choose a seed with a grammatical sentence")
    ax = show.strip(out.trace, tokenizer, steps=[0, 2, 4, 6, 8, 10, 12, 14, 16])
    ax.figure.savefig(ROOT / "data" / "denoising.png", dpi=150)
    plt.close(ax.figure)
    print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
