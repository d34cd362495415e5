"""Many answers to one problem: majority, abstention and any-of-k, with their theory."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.errors import check

ABSTAIN = -1


def majority(
    answers: Int[Tensor, "P K"],
    generator: torch.Generator | None = None,
    abstain: int = ABSTAIN,
) -> Int[Tensor, " P"]:
    """The most frequent answer of each problem; who abstains does not vote.

    Ties go to the answer that was given first, or with a generator to a random one of
    the tied.

    Args:
        answers: K sampled answers to each of P problems, as integers.
        generator: source of the random ties.
        abstain: the value that stands for no answer.
    Returns:
        the winners; `abstain` where nobody voted.
    Raises:
        ValueError: answers that are not [P, K] with K >= 1.
    Introduced in notebook 14.
    """
    leads = leading(answers, abstain)
    if generator is None:
        first = leads.int().argmax(1)
    else:
        # A uniformly random supporter of the tied: they all have as many.
        draw = torch.rand(answers.shape, generator=generator).to(answers.device)
        first = draw.masked_fill(~leads, -1).argmax(1)
    winner = answers.gather(1, first[:, None])[:, 0]
    return torch.where(leads.any(1), winner, abstain)


def majority_accuracy(
    answers: Int[Tensor, "P K"],
    truth: Int[Tensor, " P"],
    guess: float = 0.0,
    abstain: int = ABSTAIN,
) -> Float[Tensor, " P"]:
    """Chance that the majority of these answers is right, ties broken at random.

    1 / m if the truth is among m tied winners; `guess` where everybody abstained.

    Args:
        answers, abstain: as for `majority`.
        truth: the right answer of each problem.
        guess: chance that a guess without any vote is right, in [0, 1].
    Raises:
        ValueError: shapes that do not match, or guess outside [0, 1].
    Introduced in notebook 14.
    """
    check(0 <= guess <= 1, "guess", guess, "within [0, 1]")
    rows = answers.shape[:1]
    check(truth.shape == rows, "truth.shape", tuple(truth.shape), f"{tuple(rows)}")
    leads = leading(answers, abstain)
    # Tied answers have equally many supporters: shares of supporters are 1 / m.
    right = (leads & (answers == truth[:, None])).sum(1).double()
    share = right / leads.sum(1).clamp_min(1)
    return torch.where(leads.any(1), share, guess)


def leading(answers: Tensor, abstain: int) -> Bool[Tensor, "P K"]:
    """Votes for an answer that no other answer has more votes than."""
    shape = tuple(answers.shape)
    check(answers.dim() == 2 and shape[1] >= 1, "answers.shape", shape, "[P, K]")
    votes = (answers[:, :, None] == answers[:, None]).sum(2)
    votes = votes.masked_fill(answers == abstain, 0)
    return (votes == votes.max(1, keepdim=True).values) & (votes > 0)


def any_of_k(correct: Bool[Tensor, "P K"], k: int) -> Float[Tensor, " P"]:
    """Chance that at least one of k answers is right, estimated from K >= k.

    1 - C(K - c, k) / C(K, k) with c right ones: the mean over all k-subsets, so it is
    unbiased. The product form below does not overflow.

    Args:
        correct: whether each of K sampled answers is right.
        k: how many may be tried, in 1 … K.
    Raises:
        ValueError: k outside 1 … K.
    Source: Chen et al. (arXiv 2107.03374), eq. 1. Introduced in notebook 14.
    """
    total = correct.shape[-1]
    whole = isinstance(k, int) and 1 <= k <= total
    check(whole, "k", k, f"an integer within 1 … {total}")
    wrong = (~correct.bool()).sum(-1).double()
    tried = torch.arange(k, device=correct.device, dtype=torch.float64)
    left = (wrong[..., None] - tried).clamp_min(0) / (total - tried)
    return 1 - left.prod(-1)


def vote_success(
    right: Float[Tensor, "*N"] | float,
    k: int,
    wrong: Float[Tensor, "*N"] | float | None = None,
    tie: float = 0.5,
) -> Float[Tensor, "*N"]:
    """Exact chance that a majority of k independent votes between two answers is right.

    Each vote is right with chance p, wrong with chance w, and abstains otherwise:

        sum_a Bin(a; k, p + w) [ P(R_a > a / 2) + tie P(R_a = a / 2) ],
        R_a ~ Bin(a, p / (p + w)).

    Without abstention (w = 1 - p) this is Condorcet's sum. With votes that are right
    or abstain (w = 0, p = q) it is 1 - (1 - tie) (1 - q)^k.

    Args:
        right: p.
        k: number of votes, >= 1.
        wrong: w; None for 1 - p, nobody abstains.
        tie: chance to be right when the votes are level, also when nobody voted.
    Raises:
        ValueError: k < 1, or chances that are negative or sum to more than 1.
    Introduced in notebook 14.
    """
    check(isinstance(k, int) and k >= 1, "k", k, "an integer >= 1")
    check(0 <= tie <= 1, "tie", tie, "within [0, 1]")
    p = torch.as_tensor(right, dtype=torch.float64)
    w = 1 - p if wrong is None else torch.as_tensor(wrong, dtype=torch.float64)
    fits = bool((p >= 0).all() and (w >= 0).all() and (p + w <= 1 + 1e-12).all())
    check(fits, "right, wrong", (right, wrong), "chances that sum to at most 1")
    voted = (p + w).clamp(0, 1)
    turnout = binomial(k, voted)  # [*N, k + 1]
    share = torch.where(voted > 0, p / voted.clamp_min(1e-300), 0.5)
    success = torch.stack(
        [majority_of(a, share, tie) for a in range(k + 1)], dim=-1
    )  # [*N, k + 1]
    return (turnout * success).sum(-1)


def majority_of(votes: int, share: Tensor, tie: float) -> Tensor:
    """Chance that more than half of `votes` are right; level ones count `tie`."""
    mass = binomial(votes, share)
    level = tie * mass[..., votes // 2] if votes % 2 == 0 else 0.0
    return mass[..., votes // 2 + 1 :].sum(-1) + level


def binomial(n: int, p: Tensor) -> Float[Tensor, "*N n+1"]:
    """P(j successes in n trials) for j = 0 … n."""
    j = torch.arange(n + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(j + 1)
    ways = ways - torch.lgamma(n - j + 1)
    p = p[..., None]
    log_p = torch.special.xlogy(j, p) + torch.special.xlog1py(n - j, -p)
    return (ways + log_p).exp()
