"""Fast-dLLM's program for Dream: its answers, and where `decode` differs on purpose.

The program has two rules of its own. In a cached block, the refreshing forward writes
the block's first token, however unsure, and nothing else; this is how it does without
the left neighbour that Dream's shift reads. Without a cache, a step writes at most
length / steps tokens plus those that earlier steps left over. Here both are written
down with our network and our cache, and give the official answers token for token.
`decode` uses the refreshing forward in full and has no cap.
"""

import pytest
import torch

from dlmlib.decoding import Blocks, DualCache, PrefixCache, Threshold, decode
from dlmlib.model import KVCache

CACHED = [
    f"{cache}_{rule}"
    for cache in ("prefix", "dual")
    for rule in ("thr0.9", "thr0.5", "entropy_steps")
]


def best_first(logits, entropy: bool):
    """Proposed tokens [N] and their ranks, for either rule."""
    p = logits.softmax(-1)
    sure = (p * (p + 1e-10).log()).sum(-1) if entropy else p.max(-1).values
    return logits.argmax(-1), sure


def cached_blocks(model, ids, args):
    """The program's cached decoding of one row; also what each forward was fed."""
    mask_id, size, fed = model.config.mask_token_id, args["block_length"], []
    prompt = ids.shape[1]
    canvas = torch.nn.functional.pad(ids, (0, args["max_new_tokens"]), value=mask_id)
    blocks = args["max_new_tokens"] // size
    grid = torch.linspace(1, 1e-3, args["steps"] // blocks + 1)
    for start in range(prompt, canvas.shape[1], size):
        stop = start + size
        cache = KVCache(canvas.shape[1])
        fed.append(canvas.clone())
        logits = model(canvas, cache=cache).logits
        canvas[0, start] = logits[0, start].argmax()
        end = stop if args["dual_cache"] else canvas.shape[1]
        step = 1
        while (open_ := canvas[0, start:stop] == mask_id).any():
            fed.append(canvas[:, start:end].clone())
            logits = model(canvas[:, start:end], cache=cache, start=start).logits
            entropy = "threshold" not in args
            token, sure = best_first(logits[0, :size][open_], entropy)
            if entropy:
                n = int(open_.sum())
                last = step == len(grid) - 2
                share = 1 if last else 1 - grid[step + 1] / grid[step]
                chosen = sure.topk(int(n * share)).indices
            else:
                chosen = (sure >= args["threshold"]) | (sure == sure.max())
            place = start + open_.nonzero()[:, 0][chosen]
            canvas[0, place] = token[chosen]
            step += 1
    return canvas, fed


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
def test_the_cached_program(dream, name):
    """Token for token, forward for forward, with our network and cache."""
    call = dream.calls[f"fastdllm_dream/{name}"]
    golden = dream.of(f"fastdllm_dream/{name}")
    canvas, fed = cached_blocks(dream.model, golden["prompt"], call["args"])
    assert torch.equal(canvas, golden["output"])
    assert len(fed) == call["n_forwards"]
    for ours, theirs in zip(fed, golden["forward_inputs"], strict=True):
        assert torch.equal(ours, theirs[theirs >= 0][None])


@pytest.mark.parametrize("name", ["prefix_thr0.5", "dual_thr0.5"])
def test_where_decode_differs(dream, name):
    """Ours writes by the threshold at once, and needs no more forwards."""
    call = dream.calls[f"fastdllm_dream/{name}"]
    golden, args = dream.of(f"fastdllm_dream/{name}"), call["args"]
    start, size = golden["prompt"].shape[1], args["block_length"]
    out = decode(
        dream.model,
        golden["prompt"],
        length=args["max_new_tokens"],
        where=Blocks(size),
        commit=Threshold(args["threshold"]),
        reuse=DualCache() if args["dual_cache"] else PrefixCache(),
        trace=True,
    )
    theirs = golden["forward_inputs"][1]  # after the first forward
    theirs = theirs[theirs >= 0][:size] != dream.model.config.mask_token_id
    assert theirs.tolist() == [True] + [False] * (size - 1)
    logits = dream.model(golden["forward_inputs"][0]).logits[0, start : start + size]
    p = logits.softmax(-1).max(-1).values
    sure = (p >= args["threshold"]) | (p == p.max())
    assert torch.equal(out.trace.written[0, 0, start : start + size], sure)
    assert not torch.equal(sure, theirs)
    assert out.forwards <= call["n_forwards"]


@torch.no_grad()
def test_the_cap_of_the_uncached_program(dream):
    """With the cap the official canvases; without it a step writes more than two."""
    call = dream.calls["fastdllm_dream/nocache_thr0.5"]
    golden, args = dream.of("fastdllm_dream/nocache_thr0.5"), call["args"]
    mask_id, threshold = dream.model.config.mask_token_id, args["threshold"]
    canvas = golden["forward_inputs"][0].clone()
    share = (canvas == mask_id).sum().item() // args["steps"]
    left, uncapped = 0, []
    for step, theirs in enumerate(golden["forward_inputs"]):
        assert torch.equal(canvas, theirs)
        open_ = canvas[0] == mask_id
        token, sure = best_first(dream.model(canvas).logits[0, open_], False)
        allowed = left + (share if step < args["steps"] else 0)
        best = sure.topk(min(allowed, len(sure))).indices
        keep = best[(sure[best] >= threshold) | (best == best[0])]
        canvas[0, open_.nonzero()[:, 0][keep]] = token[keep]
        left = allowed - len(keep)
        uncapped.append(int((sure >= threshold).sum()))
    assert torch.equal(canvas, golden["output"])
    assert max(uncapped) > share
    out = decode(
        dream.model,
        golden["prompt"],
        length=args["max_new_tokens"],
        commit=Threshold(threshold),
    )
    assert out.forwards < call["n_forwards"]
