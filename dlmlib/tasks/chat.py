"""A chat of two subjects: facts about animals, and a dial that is moved many times.

Rows are laid out as LLaDA's fine-tuning data: a prompt in chat format, an answer that
ends in <|eot_id|>, and <|endoftext|> up to the length of the row. The dial's answer
tells any number of steps before the result, so its length is anybody's guess, and the
result is the harder to know, the fewer steps it tells.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dlmlib.device import uniform
from dlmlib.errors import check
from dlmlib.model.stand_in import llada_tokenizer

LABELS = "abcdef"
# animal: food (the likely one first), home, sound
ANIMALS = {
    "cow": ("grass", "hay", "barn", "moo"),
    "cat": ("fish", "mice", "house", "meow"),
    "dog": ("meat", "bones", "kennel", "woof"),
    "hen": ("corn", "worms", "coop", "cluck"),
    "owl": ("mice", "frogs", "tree", "hoot"),
    "pig": ("roots", "corn", "sty", "oink"),
    "frog": ("flies", "worms", "pond", "croak"),
    "bee": ("nectar", "honey", "hive", "buzz"),
    "horse": ("hay", "oats", "stable", "neigh"),
    "duck": ("bread", "snails", "pond", "quack"),
    "lion": ("meat", "bones", "cave", "roar"),
    "wolf": ("sheep", "meat", "den", "howl"),
}
LIKELY = 0.75  # how often an animal eats its first food
FORMS = {"The {} ": 0.5, "It ": 0.3, "Just ": 0.2}  # how an answer begins
SUBJECTS = {
    "What does the {} eat?": "eats ",
    "Where does the {} live?": "lives in a ",
    "What does the {} say?": "says ",
}


@dataclass(frozen=True)
class Exchange:
    """One question and one answer to it."""

    question: str
    answer: str


class Chat:
    """Questions and answers; see the top of the file.

    The dial has five marks, 0 … 4, and is moved six times. "Dial at 3: a 4 b 1 …" is
    answered with the marks reached, "a 2 b 3 … so 1.". How many of the five before the
    last are told is uniform from none to all. A move and its mark are always equally
    many tokens apart.

    Args:
        length: T, positions of a row.
        dial: share of questions about the dial.
        still: probability that a move is 0; None draws it per question from U(0, 1),
            without which the long sums are not learned.
        everywhere: share of rows whose prompt may be hidden too, as in pre-training;
            guidance needs a model that has seen answers without their questions.

    Introduced in notebook 06.
    """

    marks = 5

    def __init__(
        self,
        length: int = 48,
        dial: float = 0.7,
        still: float | None = None,
        everywhere: float = 0.2,
    ):
        self.length, self.dial, self.everywhere = length, dial, everywhere
        self.still = still
        self.tokenizer = llada_tokenizer(every_word())
        self.filler = self.tokenizer.eos_token_id
        self.end = self.tokenizer.convert_tokens_to_ids("<|eot_id|>")

    def exchanges(self, n: int, generator: torch.Generator) -> list[Exchange]:
        """Questions with an answer drawn for each."""
        check(n >= 1, "n", n, "an integer >= 1")
        draws = uniform((n, 4 + 2 * len(LABELS)), generator, "cpu").tolist()
        return [
            dial_exchange(row[1:], self.marks, self.still)
            if row[0] < self.dial
            else fact_exchange(row[1:])
            for row in draws
        ]

    def prompts(self, questions: list[str]) -> list[list[int]]:
        """Token ids of each question in the chat format."""
        chats = [[{"role": "user", "content": text}] for text in questions]
        texts = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Rows for training: prompt, answer, filler; `maskable` spares the prompt."""
        drawn = self.exchanges(n, generator)
        prompts = self.prompts([x.question for x in drawn])
        answers = self.tokenizer([x.answer for x in drawn], add_special_tokens=False)[
            "input_ids"
        ]
        ids = torch.full((n, self.length), self.filler)
        maskable = torch.ones(n, self.length, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            full = torch.tensor([*prompt, *answer, self.end])
            ids[row, : len(full)] = full
            maskable[row, : len(prompt)] = False
        free = uniform((n,), generator, "cpu") < self.everywhere
        return {"input_ids": ids, "maskable": maskable | free[:, None]}

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Rows [n, T]."""
        return self.batch(n, generator)["input_ids"]

    def render(self, answer_ids: Tensor) -> str:
        """An answer as text, up to its end."""
        ids = answer_ids.tolist()
        stops = [i for i, t in enumerate(ids) if t in (self.end, self.filler)]
        return self.tokenizer.decode(ids[: stops[0]] if stops else ids).strip()

    def grade(self, question: str, answer: str) -> bool:
        """Whether the answer's last word is right."""
        said = answer.rstrip(".").split()
        return bool(said) and said[-1] in solutions(question, self.marks)


def dial_exchange(draws: list[float], marks: int, still: float | None) -> Exchange:
    """A question about the dial, and an answer that tells some of the steps."""
    n = len(LABELS)
    start, told, chance = int(draws[0] * marks), int(draws[1] * n), draws[2]
    still = chance if still is None else still
    far, stays = draws[3 : 3 + n], draws[3 + n :]
    moves = [
        0 if stay < still else 1 + int(u * (marks - 1))
        for u, stay in zip(far, stays, strict=True)
    ]
    marked = [(start + sum(moves[: i + 1])) % marks for i in range(n)]
    asked = [f"{a} {move}" for a, move in zip(LABELS, moves, strict=True)]
    steps = [f"{a} {mark}" for a, mark in zip(LABELS[:told], marked, strict=False)]
    question = f"Dial at {start}: " + " ".join(asked)
    return Exchange(question, " ".join([*steps, f"so {marked[-1]}."]))


def fact_exchange(draws: list[float]) -> Exchange:
    """A question about an animal, and one of the answers that are right."""
    animal = list(ANIMALS)[int(draws[0] * len(ANIMALS))]
    kind = int(draws[1] * len(SUBJECTS))
    question, verb = list(SUBJECTS.items())[kind]
    facts = ANIMALS[animal]
    fact = facts[int(draws[2] >= LIKELY)] if kind == 0 else facts[1 + kind]
    names, chances = zip(*FORMS.items(), strict=True)
    edges = torch.tensor(chances).cumsum(0).tolist()
    form = names[sum(draws[3] >= edge for edge in edges[:-1])].format(animal)
    if form == "Just ":
        verb = verb.partition(" ")[2]  # "Just in a barn", "Just grass"
    return Exchange(question.format(animal), f"{form}{verb}{fact}.")


def solutions(question: str, marks: int) -> set[str]:
    """The last words that answer a question."""
    words = question.replace(":", " ").rstrip("?").split()
    if words[0] == "Dial":
        return {str(sum(int(w) for w in words if w.isdigit()) % marks)}
    facts = ANIMALS[words[3]]
    return {"eat": set(facts[:2]), "live": {facts[2]}, "say": {facts[3]}}[words[-1]]


def every_word() -> str:
    """Text that holds every word of the task, each as the tokenizer will meet it."""
    facts = [
        f"{form.format(animal)}{verb}{fact}. {question.format(animal)}"
        for animal, known in ANIMALS.items()
        for fact in known
        for form in FORMS
        for question, verb in SUBJECTS.items()
    ]
    marks = " ".join(map(str, range(Chat.marks)))
    labels = " ".join(LABELS)
    frame = f"user\n\nassistant\n\nso {marks} so. a Dial at 1: {labels} a"
    starts = "\n\n".join(["The", "It", "Just", "so", "What", "Where", "Dial", *LABELS])
    return "\n".join([frame, starts, *facts])
