"""A recipe: all that decides the weights of one experiment, and a hash of it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

OPTIONAL = ("start", "heads", "trainer", "trainer_arguments")


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of one experiment.

    name: what `load` is called with.
    description: one line for people; not part of the hash.
    task: "module:Class"; it has `tokenizer`, `length` and `sample(n, generator)`.
    task_arguments: of that class.
    model: fields of `DLMConfig`; vocabulary, special tokens and length are the task's.
    objective: arguments of `NELBO`, without the mask token; None for the
        `AutoregressiveNLL` of a causal model.
    batch_size: rows of fresh samples in a step.
    training: arguments of `fit`.
    seed: of the initial weights, the samples and the noise.
    start: recipe whose trained weights it begins from; None for random ones.
    heads: further parts of the model, name -> "module:Class", called with the config.
    trainer: "module:function" that gives what `fit` trains on, called as
        `function(model, task, **trainer_arguments)` -> (batches, objective); None for
        fresh rows of the task and the objective above.
    trainer_arguments: of that function.

    Introduced in notebook 02.
    """

    name: str
    description: str
    task: str
    task_arguments: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] | None = field(default_factory=dict)
    batch_size: int = 64
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    start: "Recipe | None" = None
    heads: dict[str, str] = field(default_factory=dict)
    trainer: str | None = None
    trainer_arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """sha256 of the recipe as canonical JSON; stored with the weights it makes.

        Fields that only some recipes have are left out where they are not set.
        """
        facts = asdict(self) | {"start": self.start and self.start.hash}
        facts = {k: v for k, v in facts.items() if k not in OPTIONAL or v}
        del facts["description"]
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
