"""Every shipped experiment, by name: data that `recipes` turns into models."""

from dataclasses import replace

from dlmlib.training.recipe import Recipe

PATHS = dict(  # of the graph tasks; the shift is Dream's: a node's own column looks up
    hidden_size=64,  # the node after it
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    rope_theta=1e5,
    initializer_range=0.1,
    shift_logits=True,
)

SUMS = dict(  # a low base: who stands next to whom is all that matters
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    rope_theta=100.0,
    initializer_range=0.1,
)


def sums(name: str, description: str, steps: int = 800, ar: bool = False, **task):
    """A recipe on running sums: masked diffusion, or its autoregressive twin."""
    twin = dict(attention="causal", shift_logits=True) if ar else {}
    return Recipe(
        name=name,
        description=description,
        task="dlmlib.tasks.sums:RunningSums",
        task_arguments=dict(terms=8, modulus=5, **task),
        model=SUMS | twin,
        objective=None if ar else dict(times="l_of_L"),
        training=dict(steps=steps, lr=4e-3, warmup=100),
    )


CHAINS = dict(  # of the arithmetic tasks
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=192,
    initializer_range=0.1,
)

CUPS = dict(  # fast rotations tell neighbours apart; the shift is Dream's
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=192,
    rope_theta=100.0,
    initializer_range=0.1,
    shift_logits=True,
)


def cups(name: str, description: str, **task):
    """A recipe on products of 24 shuffles."""
    return Recipe(
        name=name,
        description=description,
        task="dlmlib.tasks.permutations:Permutations",
        task_arguments=task,
        model=CUPS,
        objective=dict(times="l_of_L"),
        batch_size=64,
        training=dict(steps=1400, lr=4e-3, warmup=100),
    )


def graphs(name, description, task, steps=1500, warmup=100, start=None, **model):
    """A recipe on paths in graphs; a causal model is an autoregressive twin."""
    return Recipe(
        name=name,
        description=description,
        task=f"dlmlib.tasks.{task}",
        model=PATHS | model,
        objective=None if model.get("attention") == "causal" else dict(times="l_of_L"),
        batch_size=128,
        training=dict(steps=steps, lr=4e-3, warmup=warmup, ema=0.99),
        start=start,
    )


STAR = graphs(
    "star", "masked diffusion on star graphs: the path to the goal", "star:Star"
)

ARITHMETIC_START = Recipe(  # half taught: where reinforcement learning begins
    name="arithmetic_start",
    description="masked diffusion on sums of eight terms modulo 7, stopped early",
    task="dlmlib.tasks.arithmetic:Arithmetic",
    task_arguments=dict(operations=7, operators="+"),
    model=CHAINS,
    objective=dict(times="l_of_L"),
    batch_size=64,
    training=dict(steps=450, lr=4e-3, warmup=100),
)

CHAIN_START = Recipe(  # the same with six terms, and softer: a lower learning rate
    name="chain_start",
    description="masked diffusion on sums of six terms modulo 7, stopped early",
    task="dlmlib.tasks.arithmetic:Arithmetic",
    task_arguments=dict(operations=5, operators="+"),
    model=CHAINS,
    objective=dict(times="l_of_L"),
    batch_size=64,
    training=dict(steps=180, lr=2.5e-3, warmup=80),
)

PAIRS_START = replace(
    CHAIN_START,
    name="pairs_start",
    description="masked diffusion on sums of two neighbours, stopped early",
    task="dlmlib.tasks.pairs:Pairs",
    task_arguments=dict(operations=5),
    training=dict(steps=100, lr=2.5e-3, warmup=50),
)


def improved(name: str, description: str, method: str, lr: float) -> Recipe:
    """A recipe that goes on from `CHAIN_START` by a policy gradient."""
    return replace(
        CHAIN_START,
        name=name,
        description=description,
        start=CHAIN_START,
        trainer="dlmlib.rl.recipes:policy_gradient",
        trainer_arguments=dict(method=method),
        training=dict(steps=100, lr=lr, warmup=5, weight_decay=0.0),
    )


REVEALED = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    rope_theta=100.0,
    initializer_range=0.1,
)


def revealed(name: str, description: str, steps: int, data: str | None = None):
    """A recipe on problems told in parts; `data` makes it the autoregressive twin's."""
    twin = dict(attention="causal", shift_logits=True) if data else {}
    return Recipe(
        name=name,
        description=description,
        task=f"dlmlib.tasks.revealed:{'Chat' if data else 'Slots'}",
        task_arguments=dict(data=data) if data else {},
        model=REVEALED | twin,
        objective=None if data else dict(times="l_of_L"),
        batch_size=64,
        training=dict(steps=steps, lr=4e-3, warmup=100, ema=0.99),
    )


RECIPES = {
    recipe.name: recipe
    for recipe in [
        Recipe(
            name="grammar",
            description="masked diffusion on sentences of a small grammar",
            task="dlmlib.tasks.grammar:Grammar",
            model=dict(
                hidden_size=64,
                num_hidden_layers=3,
                intermediate_size=192,
                initializer_range=0.1,
            ),
            objective=dict(times="low_discrepancy"),
            batch_size=64,
            training=dict(steps=8000, lr=6e-3, warmup=100, ema=0.999),
        ),
        Recipe(
            name="chat",
            description="masked diffusion on a little chat, in LLaDA's format",
            task="dlmlib.tasks.chat:Chat",
            model=dict(
                hidden_size=64,
                num_hidden_layers=2,
                intermediate_size=192,
                initializer_range=0.1,
            ),
            objective=dict(times="l_of_L"),
            batch_size=64,
            training=dict(steps=2600, lr=5e-3, warmup=100, ema=0.99),
        ),
        graphs(
            "connectivity",
            "masked diffusion on two-path graphs, with a scratchpad",
            "connectivity:TwoPaths",
        ),
        graphs(
            "connectivity_ar",
            "the autoregressive twin of connectivity",
            "connectivity:TwoPaths",
            steps=1000,
            attention="causal",
        ),
        STAR,
        graphs(
            "both_ways",
            "masked diffusion on paths and stars at once, stopped early",
            "both_ways:BothWays",
            steps=800,
            warmup=50,
            start=STAR,
        ),
        graphs(
            "star_ar",
            "the autoregressive twin of star",
            "star:Star",
            steps=1000,
            attention="causal",
        ),
        graphs(
            "dead_ends",
            "autoregressive walks and searches among dead ends",
            "dead_ends:DeadEnds",
            steps=2200,
            num_hidden_layers=3,
            attention="causal",
        ),
        Recipe(
            name="arithmetic",
            description="masked diffusion on chains of eight operations modulo 7",
            task="dlmlib.tasks.arithmetic:Arithmetic",
            model=CHAINS,
            objective=dict(times="l_of_L"),
            batch_size=64,
            training=dict(steps=1500, lr=4e-3, warmup=100),
        ),
        Recipe(
            name="arithmetic_sentence",
            description="the same chains, with an answer somewhere after them",
            task="dlmlib.tasks.arithmetic:Arithmetic",
            task_arguments=dict(form="sentence"),
            model=CHAINS,
            objective=dict(times="l_of_L"),
            batch_size=64,
            training=dict(steps=3000, lr=4e-3, warmup=100),
        ),
        ARITHMETIC_START,
        CHAIN_START,
        PAIRS_START,
        improved(
            "chain_trajectory",
            "chain_start after GRPO on its trajectories",
            "trajectory",
            3e-4,
        ),
        improved(
            "chain_in_order",
            "chain_start after GRPO from left to right",
            "just_grpo",
            1.2e-3,
        ),
        cups("cups_chain", "masked diffusion on products of 24 shuffles: one chain"),
        cups("cups_streams", "the same products as four streams", format="streams"),
        sums("sums", "masked diffusion on running sums: one chain of 8"),
        sums("sums_shuffled", "the same sums, shuffled columns", steps=1600, stride=5),
        sums("sums_streams", "masked diffusion on 4 separate sums of 2", streams=4),
        sums("sums_separate", "masked diffusion on 8 separate terms", streams=8),
        sums("sums_ar", "the autoregressive twin of sums", ar=True),
        sums("sums_streams_ar", "the twin of sums_streams", ar=True, streams=4),
        revealed("revealed", "masked diffusion on problems told in parts", 1600),
        revealed("revealed_single", "its twin: all told at once", 400, "single"),
        revealed(
            "revealed_hindsight",
            "the twin on chats whose every answer is the last one",
            1000,
            "hindsight",
        ),
        revealed(
            "revealed_honest",
            "the twin on chats whose answers say what was known",
            1000,
            "honest",
        ),
        graphs(
            "bridge",
            "autoregressive shortest paths, paths and searches on bridges",
            "bridge:Bridge",
            steps=2900,
            num_hidden_layers=3,
            attention="causal",
        ),
    ]
}
