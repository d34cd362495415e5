"""A small grammar of English whose every probability is known exactly.

The verb agrees with a noun that may stand many words before it, with other nouns in
between: "the cat that the dogs near the house chase sleeps ." Nesting is limited, so
that a sentence fits in T tokens and the grammar is a finite automaton. Sampling, log p,
entropy and the ideal denoiser are exact: a model's NELBO is compared with the truth.
"""

from dataclasses import dataclass

import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.tasks.automaton import CHUNK, Automaton, IdealDenoiser, Walk, check_ids
from dlmlib.tasks.rules import Arc, compile_arcs, longest_sentence, parse, word_class
from dlmlib.text import BOS, EOS, word_tokenizer

# n, m: sg or pl (agreement); d: how many phrases after a noun may still be nested.
# A number before an alternative is its weight. Notation: dlmlib/tasks/rules.py.
RULES = """
S        -> NP[n,2] VP[n] .
NP[n,d]  -> 4 DET[n] NOUN[n] | 2 DET[n] ADJ NOUN[n]
          | 2 DET[n] NOUN[n] PP[d-1] | 6 DET[n] NOUN[n] RC[n,d-1]
PP[d]    -> PREP the PLACE[n]
RC[n,d]  -> 1 that VI[n] | 1 that VT[n] NP[m,d] | 2 that NP[m,d] VT[m]
VP[n]    -> 1 VI[n] | 1 VI[n] ADV | 3 VT[n] NP[m,0]
DET[n]   -> 4 the | 2 a/some | 1 every/many
NOUN[n]  -> cat/cats | dog/dogs | girl/girls | boy/boys | bird/birds | horse/horses
PLACE[n] -> house/houses | tree/trees | river/rivers
VT[n]    -> sees/see | chases/chase | likes/like | follows/follow
VI[n]    -> sleeps/sleep | sings/sing | waits/wait | smiles/smile
ADJ      -> small | old | happy
ADV      -> again | today | outside
PREP     -> near | behind
"""


@dataclass
class AgreementCases:
    """Sentences and their main verbs; N cases.

    Attributes:
        input_ids: [N, T] grammatical sentences.
        position: [N] where the main verb stands.
        correct: [N] the verb in the form that agrees with the subject (as written).
        wrong: [N] the same verb in the other number.
        distance: [N] words from the subject's noun to the verb; 1 is side by side.
        attractors: [N] nouns of the other number between the two.
    """

    input_ids: Int[Tensor, "N T"]
    position: Int[Tensor, " N"]
    correct: Int[Tensor, " N"]
    wrong: Int[Tensor, " N"]
    distance: Int[Tensor, " N"]
    attractors: Int[Tensor, " N"]


class Grammar:
    """An unambiguous probabilistic grammar with bounded nesting.

    A sequence is [BOS], a sentence, then [EOS] up to T tokens. [EOS] is an ordinary
    token to learn; [BOS] is the prompt, never masked. A network with relative positions
    needs it: if all tokens were [MASK], every position would look the same. The exact
    arithmetic is float64 on the CPU, where results stay, since not every device has
    float64. Introduced in notebook 02.

    Args:
        rules: the rules as text (notation: `dlmlib/tasks/rules.py`).
        length: T; by default the length of the longest sentence.

    Attributes:
        tokenizer, length: its tokenizer and T.
        automaton: the compiled rules; state k has `states[k]` still to be written.

    Raises:
        ValueError: rules that cannot be read, never end or are ambiguous, or a length
            below that of the longest sentence.
    """

    def __init__(self, rules: str = RULES, length: int | None = None):
        parsed = parse(rules)
        arcs = compile_arcs(parsed)
        longest = 1 + longest_sentence(arcs)
        self.length = longest if length is None else length
        check(self.length >= longest, "length", length, f"an integer >= {longest}")
        classes = dict.fromkeys(arc.reads for arc in arcs)
        self.lexicon = {name: word_class(name, parsed) for name in classes}
        words = dict.fromkeys(word for entry in self.lexicon.values() for word in entry)
        self.tokenizer = word_tokenizer(list(words))
        self.lexicon |= {BOS: {BOS: 1.0}, EOS: {EOS: 1.0}}  # around the sentence
        arcs = [Arc((BOS, "S"), BOS, ("S",), 1.0), *arcs, Arc((), EOS, (), 1.0)]
        self.states = list(dict.fromkeys(arc.source for arc in arcs))  # the end is last
        self.automaton = self._automaton(arcs)
        check(not self.automaton.is_ambiguous(), "rules", rules, "one parse a sentence")

    def _automaton(self, arcs: list[Arc]) -> Automaton:
        state = {stack: k for k, stack in enumerate(self.states)}
        index = {name: k for k, name in enumerate(self.lexicon)}
        emission = torch.zeros(len(index), len(self.tokenizer), dtype=torch.float64)
        for name, words in self.lexicon.items():
            for word, probability in words.items():
                token = self.tokenizer.convert_tokens_to_ids(word)
                emission[index[name], token] = probability
        return Automaton(
            source=[state[arc.source] for arc in arcs],
            target=[state[arc.target] for arc in arcs],
            reads=[index[arc.reads] for arc in arcs],
            weight=[arc.weight for arc in arcs],
            emission=emission,
            length=self.length,
        )

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A training batch of n fresh sentences.

        Returns:
            input_ids [n, T], and maskable [n, T]: everything but [BOS].

        Raises:
            ValueError: n < 1.
        """
        ids = self.sample(n, generator)
        return {"input_ids": ids, "maskable": ids != self.tokenizer.bos_token_id}

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n T"]:
        """Draw n sentences; all rows walk through the automaton together.

        Args:
            n: how many, at least 1.
            generator: a CPU generator.

        Returns:
            [n, T] ids, each row [BOS], a sentence and [EOS] up to T.

        Raises:
            ValueError: n < 1.
        """
        return self._walk(n, generator).input_ids

    def dataset(self, n: int, seed: int) -> Dataset:
        """n sampled sentences as a `datasets.Dataset`.

        Returns:
            Columns input_ids ([T] tensors) and text (the sentence alone).

        Raises:
            ValueError: n < 1.
        """
        ids = self.sample(n, torch.Generator().manual_seed(seed))
        text = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        columns = {"input_ids": ids.tolist(), "text": text}
        return Dataset.from_dict(columns).with_format("torch")

    def encode(self, text: str | list[str]) -> Int[Tensor, "B T"]:
        """Token ids: [BOS], the sentence, [EOS] up to T; [MASK] may stand for any word.

        Raises:
            ValueError: an unknown word, or more than T - 1 words.
        """
        lines, rows = [text] if isinstance(text, str) else text, []
        for line in lines:
            ids = self.tokenizer.encode(f"{BOS} {line}")
            filler = self.length - len(ids)
            check(filler >= 0, "text", line, f"at most {self.length - 1} words")
            rows.append(ids + [self.tokenizer.eos_token_id] * filler)
        return torch.tensor(rows)

    def log_prob(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """Exact log-probability of each row: the forward algorithm.

        [MASK] fits every word, so a partly masked row gets log p(visible words).

        Args:
            input_ids: [B, T].

        Returns:
            [B] natural logarithms, float64 on the CPU; -inf if ungrammatical.

        Raises:
            ValueError: not [B, T], or ids outside the vocabulary.
        """
        return self._prefix_mass(input_ids)[-1, -1].log()

    def grammatical(self, input_ids: Int[Tensor, "B T"]) -> Bool[Tensor, " B"]:
        """Whether each row is a sentence of the grammar; a row with a [MASK] is not.

        Args and Raises: as `log_prob`. Returns: [B] on the CPU.
        """
        possible = self.log_prob(input_ids).isfinite()
        return possible & (input_ids != self.tokenizer.mask_token_id).all(1).cpu()

    def first_error(self, input_ids: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
        """Index of the first token after which no sentence can follow; -1 if none.

        Args and Raises: as `log_prob`. Returns: [B] on the CPU.
        """
        dead = self._prefix_mass(input_ids)[1:].sum(1) == 0  # [T, B]
        return torch.where(dead.any(0), dead.int().argmax(0), -1)

    def entropy(self) -> float:
        """Entropy of a sentence in nats, in closed form since it has one path.

        H(state) = Σ_arcs p (-ln p + H(word) + H(next state)).
        """
        return self.automaton.entropy()

    def denoiser(self) -> IdealDenoiser:
        """The ideal denoiser of this grammar as a module."""
        return IdealDenoiser(self.automaton, self.tokenizer.mask_token_id)

    def agreement_cases(self, n: int, generator: torch.Generator) -> AgreementCases:
        """n sentences for a test of agreement: mask `position`, compare two verb forms.

        The main verb is the first word of VP, its subject the first noun of the row.

        Raises:
            ValueError: n < 1, or rules without NOUN[n] and VP[n].
        """
        walk, names = self._walk(n, generator), list(self.lexicon)
        opens_verb = torch.tensor([bool(s) and s[0][:3] == "VP[" for s in self.states])
        is_noun = torch.tensor([name[:5] in ("NOUN[", "PLACE") for name in names])
        plural = torch.tensor([name.endswith("[pl]") for name in names])
        verb, noun = opens_verb[walk.states], is_noun[walk.classes]  # [N, T]
        found = bool((verb.any(1) & noun.any(1)).all())
        check(found, "rules", names, "rules in which S has a NOUN[n] and a VP[n]")
        position, subject = verb.int().argmax(1), noun.int().argmax(1)
        number = plural[walk.classes]  # [N, T]
        between = noun & (torch.arange(self.length) < position[:, None])
        other = number != number.gather(1, subject[:, None])
        correct = walk.input_ids.gather(1, position[:, None])[:, 0]
        return AgreementCases(
            input_ids=walk.input_ids,
            position=position,
            correct=correct,
            wrong=self._other_number()[correct],
            distance=position - subject,
            attractors=(between & other).sum(1),
        )

    def _other_number(self) -> Int[Tensor, " V"]:
        """Every token in the other number; itself if it has none."""
        swap = torch.arange(len(self.tokenizer))
        for name, words in self.lexicon.items():
            if name.endswith("[sg]") and (twin := name[:-4] + "[pl]") in self.lexicon:
                one = self.tokenizer.convert_tokens_to_ids(list(words))
                two = self.tokenizer.convert_tokens_to_ids(list(self.lexicon[twin]))
                swap[one], swap[two] = torch.tensor(two), torch.tensor(one)
        return swap

    def _walk(self, n: int, generator: torch.Generator) -> Walk:
        check(n >= 1, "n", n, "an integer >= 1")
        return self.automaton.walk(n, generator)

    def _prefix_mass(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "T+1 K B"]:
        """Forward algorithm in chunks of rows, so that memory stays small."""
        check_ids(input_ids, self.automaton)
        automaton, mask = self.automaton, self.tokenizer.mask_token_id
        parts = [
            automaton.forward_mass(automaton.likelihood(rows, mask))
            for rows in input_ids.cpu().split(CHUNK)
        ]
        return torch.cat(parts, 2)
