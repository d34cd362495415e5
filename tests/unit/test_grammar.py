"""The grammar against brute force: every closed form equals an enumeration."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dlmlib.tasks.automaton import Automaton
from dlmlib.tasks.grammar import Grammar
from dlmlib.tasks.rules import parse, productions

REDUCED = """
S       -> NP[n,1] VP[n] .
NP[n,d] -> 3 DET[n] NOUN[n] | 1 DET[n] NOUN[n] RC[n,d-1]
RC[n,d] -> that VI[n] | 2 that NP[m,d] VT[m]
VP[n]   -> 2 VI[n] | 1 VT[n] us
DET[n]  -> 2 the | a/two
NOUN[n] -> 2 cat/cats | dog/dogs
VT[n]   -> sees/see
VI[n]   -> sleeps/sleep
"""
TELESCOPE = """
S  -> she sees NP PP | she sees NP
NP -> the man PP | the man
PP -> with glasses
"""
MASK = 1

grammar, reduced = Grammar(), Grammar(REDUCED)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def derivations(symbols, rules):
    """Every (probability, words), straight from the rules without the automaton."""
    if not symbols:
        return [(1.0, ())]
    first, rest = symbols[0], derivations(symbols[1:], rules)
    if first.split("[")[0] not in rules:
        return [(p, (first, *words)) for p, words in rest]
    heads = [
        (p * q, words)
        for p, parts in productions(first, rules)
        for q, words in derivations(parts, rules)
    ]
    return [(p * q, head + words) for p, head in heads for q, words in rest]


@pytest.fixture(scope="module")
def enumerated():
    """All sentences of the reduced grammar, [N, T] ids and [N] probabilities."""
    pairs = derivations(("S",), parse(REDUCED))
    ids = reduced.encode([" ".join(words) for _, words in pairs])
    return ids, torch.tensor([p for p, _ in pairs], dtype=torch.float64)


def test_each_derivation_writes_another_sentence(enumerated):
    ids, p = enumerated
    # number 2, subject 4 plain or 4 x (1 + 8 x 1) with a clause, predicate 2
    assert len(ids) == len(ids.unique(dim=0)) == 2 * (4 + 36) * 2
    assert p.sum().item() == pytest.approx(1, abs=1e-12)


def test_log_prob_and_entropy_equal_the_enumeration(enumerated):
    ids, p = enumerated
    torch.testing.assert_close(reduced.log_prob(ids), p.log(), rtol=0, atol=1e-12)
    entropy = -(p * p.log()).sum().item()
    assert reduced.entropy() == pytest.approx(entropy, abs=1e-12)


def test_log_prob_of_one_sentence_by_hand():
    # number 1/2; DET NOUN 4/14; the 4/7; cat 1/6; VI 1/5; sleeps 1/4
    by_hand = math.log(1 / 2 * 4 / 14 * 4 / 7 * 1 / 6 * 1 / 5 * 1 / 4)
    log_prob = grammar.log_prob(grammar.encode("the cat sleeps ."))
    assert log_prob.dtype == torch.float64
    assert log_prob.item() == pytest.approx(by_hand, abs=1e-12)


def test_samples_follow_the_exact_distribution(enumerated):
    ids, p = enumerated
    n = 30_000
    counts = Counter(map(tuple, reduced.sample(n, generator()).tolist()))
    observed = torch.tensor([counts[tuple(row)] for row in ids.tolist()]).double()
    assert observed.sum() == n
    assert n * p.min() > 5  # every sentence is a bin of its own
    assert chisquare(observed, n * p).pvalue > 1e-3


def test_sampling_is_reproducible_and_the_default_matches_its_entropy():
    ids = grammar.sample(4000, generator(1))
    assert torch.equal(ids, grammar.sample(4000, generator(1)))
    nats = -grammar.log_prob(ids)
    error = nats.std().item() / len(ids) ** 0.5
    assert abs(nats.mean().item() - grammar.entropy()) < 4 * error
    assert grammar.grammatical(ids).all()


def test_default_is_small_and_within_its_stated_size():
    assert grammar.length == 17
    assert len(grammar.states) < 300
    assert 12 < grammar.entropy() < 20
    assert 40 <= len(grammar.tokenizer) - 4 <= 60
    ids = grammar.sample(2000, generator())
    eos = ids == grammar.tokenizer.eos_token_id
    assert (ids[:, 0] == grammar.tokenizer.bos_token_id).all()
    assert (eos[:, :-1] <= eos[:, 1:]).all()  # filler only after the sentence
    assert not eos.all(0)[-1]  # some sentence needs all T tokens


def test_every_sentence_of_the_default_has_one_path():
    assert not grammar.automaton.is_ambiguous()
    assert paths(grammar, grammar.sample(1000, generator())).eq(1).all()


def paths(g, ids):
    """How many accepting paths read each row: the forward algorithm with weights 1."""
    a = g.automaton
    arcs = [x.tolist() for x in (a.source, a.target, a.reads)]
    count = Automaton(*arcs, [1.0] * len(arcs[0]), a.emission > 0, a.length)
    return count.forward_mass(count.likelihood(ids, MASK))[-1, -1]


@pytest.mark.parametrize(
    "rules",
    [
        TELESCOPE,
        "S -> A B\nA -> x | x x\nB -> x | x x",
        "S -> x | A\nA -> x",
        "S -> A | A\nA -> x | y",
        "S -> A B\nA -> x y | x\nB -> z | y z",
        "S -> A[n] C\nA[n] -> same\nC -> x | y",
    ],
)
def test_ambiguous_rules_are_refused(rules):
    words = [words for _, words in derivations(("S",), parse(rules))]
    assert len(set(words)) < len(words)
    with pytest.raises(ValueError, match="one parse"):
        Grammar(rules)


@pytest.mark.parametrize(
    "rules",
    [
        "S -> A B\nA -> x y | x\nB -> z | w",
        "S -> x | y x",
        "S -> A[n] C[n]\nA[n] -> same\nC[n] -> x/y",
        TELESCOPE.replace("she sees NP PP |", ""),
    ],
)
def test_unambiguous_rules_are_accepted(rules):
    words = [words for _, words in derivations(("S",), parse(rules))]
    g = Grammar(rules)
    assert len(set(words)) == len(words)
    assert g.log_prob(g.encode([" ".join(w) for w in words])).exp().sum() == (
        pytest.approx(1, abs=1e-12)
    )


def test_denoiser_equals_the_enumeration_for_every_mask_pattern(enumerated):
    ids, p = enumerated
    denoiser, size = reduced.denoiser(), len(reduced.tokenizer)
    kept = torch.randperm(len(ids), generator=generator())[:16]
    one_hot = torch.nn.functional.one_hot(ids, size).double()  # [N, T, V]
    weighted = (p[:, None, None] * one_hot).flatten(1)
    positions = torch.arange(reduced.length - 1)
    for pattern in range(2 ** len(positions)):
        hidden = torch.cat([torch.tensor([False]), pattern >> positions & 1 == 1])
        rows = ids[kept].masked_fill(hidden, MASK).unique(dim=0)
        agrees = (ids[None] == rows[:, None]) | hidden
        match = agrees.all(2).double()  # [B, N]
        exact = (match @ weighted).unflatten(1, (-1, size)) / (match @ p)[:, None, None]
        got = denoiser(rows).logits.exp()
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            reduced.log_prob(rows), (match @ p).log(), rtol=0, atol=1e-12
        )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(1, 17)))
def test_chain_rule_in_any_order_gives_log_prob(seed, order):
    denoiser, ids = grammar.denoiser(), grammar.sample(6, generator(seed))
    canvas = torch.full_like(ids, MASK)
    canvas[:, 0] = ids[:, 0]
    total = torch.zeros(len(ids), dtype=torch.float64)
    for position in order:
        logits = denoiser(canvas).logits[:, position]
        total += logits.gather(1, ids[:, [position]])[:, 0]
        canvas[:, position] = ids[:, position]
        torch.testing.assert_close(grammar.log_prob(canvas), total, atol=1e-9, rtol=0)
    torch.testing.assert_close(total, grammar.log_prob(ids), atol=1e-9, rtol=0)


def test_denoiser_logits_are_safe_to_decode_from():
    denoiser = grammar.denoiser()
    ids = grammar.encode(["the cat [MASK] .", "sleeps the the [MASK] ."])
    ids[1, 8:] = MASK
    logits = denoiser(ids).logits
    p = logits.softmax(-1)
    assert logits.isfinite().all()
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    entropy = -(p * logits.log_softmax(-1)).sum(-1)
    assert entropy.isfinite().all()
    visible = ids != MASK
    assert torch.equal(p.argmax(-1)[visible], ids[visible])
    assert (p[visible].amax(-1) == 1).all()
    verbs = grammar.tokenizer.convert_ids_to_tokens(p[0, 3].nonzero()[:, 0])
    assert set(verbs) == {"sleeps", "sings", "waits", "smiles"}


def test_impossible_context_gets_the_marginal():
    denoiser = grammar.denoiser()
    blank = torch.full((1, grammar.length), MASK)
    marginal = denoiser(blank).logits
    broken = grammar.encode("sleeps the the [MASK] .")
    broken[0, 8:] = MASK
    assert grammar.log_prob(broken).item() == -math.inf
    logits = denoiser(broken).logits
    torch.testing.assert_close(logits[0, 4], marginal[0, 4])
    torch.testing.assert_close(logits[0, 8:], marginal[0, 8:])
    empirical = (
        (
            grammar.sample(20_000, generator())[:, 2, None]
            == torch.arange(len(grammar.tokenizer))
        )
        .double()
        .mean(0)
    )
    torch.testing.assert_close(marginal[0, 2].exp(), empirical, atol=0.015, rtol=0)


def test_denoiser_rows_do_not_depend_on_the_batch():
    ids = grammar.sample(1030, generator())  # more rows than one chunk
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator()) < 0.5, MASK)
    denoiser = grammar.denoiser()
    logits = denoiser(ids).logits
    for row in (0, 1023, 1024, 1029):
        torch.testing.assert_close(denoiser(ids[[row]]).logits[0], logits[row])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("the cat that the dogs near the house chase sleeps .", -1),
        ("the cat that the dogs near the house chase sleep .", 10),
        ("the cat that the dogs near the house chases sleeps .", 9),
        ("the cats near the tree sleeps .", 6),
        ("a dogs sleep .", 2),
        ("the cat sleeps", 4),
        ("the cat sleeps . sleeps", 5),
        ("the cat sleeps the dog .", 4),
        ("", 1),
        ("the [PAD] sleeps .", 2),
        ("the cat that sees the dog that the birds like sings .", -1),
        ("the cat that sees the dog that likes the bird that sings sleeps .", 11),
    ],
)
def test_agreement_and_structure_are_judged(text, error):
    ids = grammar.encode(text)
    assert grammar.first_error(ids).item() == error
    assert grammar.grammatical(ids).item() == (error == -1)
    assert grammar.log_prob(ids).isfinite().item() == (error == -1)


def test_a_masked_row_is_possible_but_not_grammatical():
    ids = grammar.encode(["the cat [MASK] .", "the cats [MASK] [MASK] sleeps ."])
    assert grammar.log_prob(ids).isfinite().tolist() == [True, False]
    assert grammar.grammatical(ids).tolist() == [False, False]
    assert grammar.first_error(ids).tolist() == [-1, 5]


def test_first_error_agrees_with_an_enumeration_of_prefixes(enumerated):
    ids, _ = enumerated
    rows = reduced.sample(300, generator())
    noise = torch.randint(4, len(reduced.tokenizer), rows.shape, generator=generator(1))
    flip = torch.rand(rows.shape, generator=generator(2)) < 0.15
    rows = torch.where(flip, noise, rows)
    same = (rows[:, None] == ids).long().cumprod(2).any(1)  # [B, T] prefix exists
    expected = torch.where(same.all(1), -1, (~same).int().argmax(1))
    assert torch.equal(reduced.first_error(rows), expected)
    assert (expected >= 0).sum() > 50


def test_agreement_cases_test_the_main_verb():
    cases = grammar.agreement_cases(1500, generator())
    tokens, rows = grammar.tokenizer, torch.arange(1500)
    assert torch.equal(cases.input_ids[rows, cases.position], cases.correct)
    swapped = cases.input_ids.clone()
    swapped[rows, cases.position] = cases.wrong
    assert not grammar.grammatical(swapped).any()
    for pair in zip(cases.correct[:50], cases.wrong[:50], strict=True):
        plural, singular = sorted(tokens.convert_ids_to_tokens(pair), key=len)
        assert singular == plural + "s"
    masked = cases.input_ids.clone()
    masked[rows, cases.position] = MASK
    p = grammar.denoiser()(masked).logits.exp()[rows, cases.position]
    assert (p[rows, cases.correct] > 0.1).all()
    assert (p[rows, cases.wrong] == 0).all()


def test_agreement_cases_count_distance_and_attractors():
    cases = grammar.agreement_cases(1500, generator())
    singular = ["cat", "dog", "girl", "boy", "bird", "horse", "house", "tree", "river"]
    nouns = {word + s: s for word in singular for s in ("", "s")}
    for k in range(300):
        words = grammar.tokenizer.convert_ids_to_tokens(cases.input_ids[k])
        before = [(i, nouns[w]) for i, w in enumerate(words) if w in nouns]
        before = [(i, s) for i, s in before if i < cases.position[k]]
        subject, number = before[0]
        assert cases.distance[k] == cases.position[k] - subject
        assert cases.attractors[k] == sum(s != number for _, s in before)
    assert (cases.attractors > 0).float().mean() > 0.2
    assert cases.distance.max() > 8


def test_dataset_holds_the_samples_and_their_text():
    data = grammar.dataset(50, seed=3)
    ids = grammar.sample(50, generator(3))
    assert data.column_names == ["input_ids", "text"]
    assert torch.equal(data[:]["input_ids"], ids)
    assert torch.equal(grammar.encode(data[:]["text"]), ids)
    assert data[0]["text"].endswith(" .")


def test_batch_lets_everything_but_bos_be_masked():
    batch = grammar.batch(5, generator())
    assert torch.equal(batch["input_ids"], grammar.sample(5, generator()))
    assert batch["maskable"].sum(1).tolist() == [16] * 5
    assert not batch["maskable"][:, 0].any()


def test_a_longer_canvas_changes_nothing_but_the_filler(enumerated):
    longer, (ids, p) = Grammar(REDUCED, length=reduced.length + 3), enumerated
    filler = torch.full((len(ids), 3), reduced.tokenizer.eos_token_id)
    torch.testing.assert_close(longer.log_prob(torch.cat([ids, filler], 1)), p.log())
    assert longer.entropy() == pytest.approx(reduced.entropy(), abs=1e-12)


def test_denoiser_runs_in_a_state_dict_round_trip():
    denoiser, other = reduced.denoiser(), Grammar(REDUCED).denoiser()
    other.load_state_dict(denoiser.state_dict())
    ids = reduced.sample(3, generator())
    assert torch.equal(denoiser(ids).logits, other(ids).logits)
    assert denoiser.mask_token_id == MASK


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 17), 99), r"input_ids=\[99, 99, 99\]: expected ids in 0\.\."),
        (torch.full((1, 17), -1), "input_ids="),
        (torch.ones(1, 16, dtype=torch.long), "input_ids.shape"),
        (torch.ones(17, dtype=torch.long), "input_ids.shape"),
        (torch.ones(1, 17), "input_ids.dtype"),
        (torch.ones(1, 17, dtype=torch.bool), "input_ids.dtype"),
    ],
)
def test_wrong_ids_are_refused_everywhere(ids, message):
    calls = (grammar.log_prob, grammar.grammatical, grammar.first_error)
    for call in (*calls, grammar.denoiser()):
        with pytest.raises(ValueError, match=message):
            call(ids)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("NP -> cat", "a rule for S"),
        ("S => cat", "lines like"),
        ("S -> cat |", "not empty"),
        ("S -> cat\nS -> dog", "one line that defines S"),
        ("S -> NP[sg] .\nNP -> cat", "arguments"),
        ("S -> NP[sg] .", "a symbol that a rule defines"),
        ("S -> NP[0]\nNP[d] -> cat NP[d-1]", "possible at this depth"),
        ("S -> cat/cats", "a rule with n on its left"),
        ("S -> A .\nA -> 2 x | 1 x", "each word once"),
        ("S -> S x | y", "recursion that ends"),
        ("S -> x S | y", "recursion that ends"),
        ("S -> x S z | y", "recursion that ends"),
        ("S -> A B\nA -> B\nB -> A", "recursion that ends"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Grammar(rules)


def test_wrong_sizes_and_texts_are_refused():
    with pytest.raises(ValueError, match="length=16: expected an integer >= 17"):
        Grammar(length=16)
    for call in (grammar.sample, grammar.batch, grammar.agreement_cases):
        with pytest.raises(ValueError, match="n=0: expected an integer >= 1"):
            call(0, generator())
    with pytest.raises(ValueError, match="n=-1"):
        grammar.dataset(-1, seed=0)
    with pytest.raises(ValueError, match="'zebra'"):
        grammar.encode("the zebra sleeps .")
    with pytest.raises(ValueError, match="at most 16 words"):
        grammar.encode("the " * 17)
    with pytest.raises(ValueError, match="a NOUN"):
        Grammar("S -> hello world").agreement_cases(3, generator())
