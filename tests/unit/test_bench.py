"""The bench: what it measures, in which order, and what it writes."""

import json
from statistics import median

import pytest
import torch
import torch.nn.functional as F

from dlmlib import bench

PEERS = '''
import torch

def plain(model, prompt, steps, gen_length, block_length, temperature=0.0, mask_id=0):
    """Writes token 1 everywhere; two forwards."""
    assert temperature == 0.0 and not torch.is_grad_enabled()
    model(prompt), model(prompt, attention_mask=torch.ones_like(prompt)).logits
    return torch.cat([prompt, prompt.new_ones(len(prompt), gen_length)], dim=1)

def with_count(model, prompt, **options):
    return plain(model, prompt.to(model.device), **options), 2

def broken(model, prompt, **options):
    raise RuntimeError("peer failed")
'''


def options_of(*arguments):
    """The options of a tiny run."""
    return bench.parsed(["--tiny", "--device", "cpu", *arguments])


@pytest.fixture
def peers(tmp_path):
    """A file with peers."""
    file = tmp_path / "peers.py"
    file.write_text(PEERS)
    return file


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A run with all parts and with a reference as peer, read back from its file."""
    folder = tmp_path_factory.mktemp("bench")
    out, file = folder / "new" / "bench.json", folder / "upstream.py"
    file.write_text("from test_bench import uncached as generate")
    modes = "lossless,full,prefix,dual,threshold,dual+threshold"
    arguments = f"--tiny --device cpu --modes {modes} --peer {file}:generate"
    assert bench.main([*arguments.split(), "--out", str(out)]) == 0
    return json.loads(out.read_text())


@torch.no_grad()
def uncached(model, prompt, steps, gen_length, block_length, temperature, mask_id):
    """LLaDA's generate, written out: the whole canvas and vocabulary at every step."""
    ids = F.pad(prompt, (0, gen_length), value=mask_id)
    blocks = gen_length // block_length
    for block in range(blocks):
        stop = prompt.shape[1] + (block + 1) * block_length
        for _ in range(steps // blocks):
            probability = model(ids).logits.softmax(-1)
            probability[..., mask_id] = 0
            best, token = probability.max(-1)
            best = torch.where(ids == mask_id, best, -1.0)
            best[:, stop:] = -1.0
            for row, chosen in enumerate(best.topk(gen_length // steps).indices):
                ids[row, chosen] = token[row, chosen]
    return ids


def test_numbers_are_consistent(result):
    """Medians and ratios are those of the listed seconds."""
    first = median(result["modes"][0]["seconds"])
    for mode in result["modes"]:
        seconds = mode["seconds"]
        assert len(seconds) == bench.TINY["repeats"] and min(seconds) > 0
        assert mode["median"] == median(seconds)
        assert mode["spread"] == max(seconds) - min(seconds)
        assert mode["ratio"] == mode["median"] / first
        assert mode["tokens_per_forward"] * mode["forwards"] == 16
        assert mode["peak_extra_bytes"] > 0
    assert result["modes"][0]["ratio"] == 1


def test_what_is_written(result):
    """Arguments and facts of the machine, but no place and no name."""
    assert result["arguments"] == {**bench.SIZES, **bench.TINY}
    assert result["machine"] == {
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    assert "/" not in json.dumps(result)


def test_forwards(result):
    """Eight steps; a threshold that random weights never reach is a token a step."""
    forwards = {mode["name"]: mode["forwards"] for mode in result["modes"]}
    assert forwards == {
        "lossless": 8,
        "full": 8,
        "prefix": 8,
        "dual": 8,
        "threshold": 16,
        "dual+threshold": 16,
        "upstream:generate": 8,
    }


def test_exact_modes_match_the_reference(result):
    """Lossless decoding, also without chosen logits, gives LLaDA's tokens."""
    same = {mode["name"]: set(mode["same_tokens_as"]) for mode in result["modes"]}
    exact = {"lossless", "full", "upstream:generate"}
    for name in exact:
        assert exact - {name} <= same[name]
    assert result["exact_modes_agree"] is True


def test_reference_at_several_sizes(peers):
    """The tokens stay the reference's with more rows and another block length."""
    for size in ("--batch 3 --steps 16", "--block 16 --steps 4", "--prompt 1"):
        options = options_of(*size.split(), "--repeats", "1")
        model = bench.random_model(options, torch.device("cpu"), torch.float32)
        prompt = torch.randint(60, (options.batch, options.prompt))
        found = bench.own_mode("lossless", model, prompt, options).run()
        sizes = options.steps, options.answer, options.block
        assert torch.equal(found, uncached(model, prompt, *sizes, 0.0, 60))
        assert not (found == 60).any()


def test_modes_take_turns():
    """A B A B, never A A B B."""
    calls, tokens = [], torch.zeros(1, 1)

    def mode(name):
        return bench.Mode(name, lambda: (calls.append(name), tokens)[1])

    modes = [mode(name) for name in "ABC"]
    bench.interleave(modes, 3, torch.device("cpu"))
    assert "".join(calls) == "ABCABCABC"
    assert [len(m.seconds) for m in modes] == [3, 3, 3]


def test_one_differing_run_is_not_identical():
    """Every run of both modes counts."""
    one, two = torch.zeros(1, 2), torch.ones(1, 2)
    steady = bench.Mode("steady", None, tokens=[one, one])
    fickle = bench.Mode("fickle", None, tokens=[one, two])
    assert bench.same_tokens(steady, steady)
    assert not bench.same_tokens(steady, fickle)
    assert not bench.same_tokens(fickle, fickle)


def test_differing_exact_modes_fail_the_run(monkeypatch, tmp_path):
    """The exit status says so; the file is written for a look."""
    monkeypatch.setattr(bench, "EXACT", ("lossless", "threshold"))
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--device", "cpu", "--out", str(out)]
    assert bench.main([*arguments, "--modes", "lossless,threshold"]) == 1
    assert json.loads(out.read_text())["exact_modes_agree"] is False


def test_peers(peers):
    """A tensor or a tuple comes back; wrong tokens are not reported as the same."""
    sources = [f"{peers}:plain", f"{peers}:with_count"]
    arguments = [word for source in sources for word in ("--peer", source)]
    result = bench.measure(options_of("--modes", "lossless", *arguments))
    own, plain, counted = result["modes"]
    assert own["same_tokens_as"] == []
    assert plain["same_tokens_as"] == ["peers:with_count"]
    assert counted["same_tokens_as"] == ["peers:plain"]
    assert plain["forwards"] == counted["forwards"] == 2


@pytest.mark.parametrize("source", ["{0}:absent", "{0}x:plain", "plain", "{0}"])
def test_missing_peer(peers, source):
    source = source.format(peers)
    with pytest.raises(ValueError, match="peer=") as caught:
        bench.measure(options_of("--peer", source))
    assert source in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--modes lossless,fast", "modes='fast'"),
        ("--modes dual+", r"modes='dual\+'"),
        ("--repeats 0", "repeats=0"),
        ("--width 0", "width=0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.measure(options_of(*arguments.split()))


def test_tiny_only_changes_defaults():
    """What is given on the command line stays."""
    options = options_of("--width", "48")
    assert (options.width, options.layers) == (48, bench.TINY["layers"])


def test_failed_run_keeps_the_old_file(peers, tmp_path):
    out = tmp_path / "old.json"
    out.write_text("old")
    arguments = ["--tiny", "--device", "cpu", "--out", str(out)]
    with pytest.raises(RuntimeError, match="peer failed"):
        bench.main([*arguments, "--peer", f"{peers}:broken"])
    assert out.read_text() == "old"


def test_failed_write_keeps_the_old_file(monkeypatch, tmp_path):
    """The new file appears whole or not at all, and leaves nothing behind."""
    out = tmp_path / "old.json"
    out.write_text("old")
    monkeypatch.setattr(bench.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.write(out, {"new": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["old.json"]
    assert out.read_text() == "old"


def test_extra_memory_counts_tensors():
    """Two of three tensors of 4 MB live at once; what lived before does not count."""
    before = torch.ones(1_000_000)

    def run():
        one = before + 1
        two = one + 1
        del one
        return two + 1

    extra = bench.extra_memory(run, torch.device("cpu"))
    assert 8_000_000 <= extra < 8_100_000
