"""The bench: what it measures, in which order, and what it writes."""

import json
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from toys import gen

from dlmlib import bench, roofline
from dlmlib.gauges import graphed

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
        model = bench.random_model(options, torch.device("cpu"), torch.float64)
        prompt = torch.randint(60, (options.batch, options.prompt), generator=gen(0))
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


def test_one_exact_mode_agrees_with_nothing():
    """Neither true nor false, and no reason to fail."""
    assert bench.measure(options_of("--modes", "lossless"))["exact_modes_agree"] is None
    both = bench.measure(options_of("--modes", "lossless,full,dual"))
    assert both["exact_modes_agree"] is True


def test_a_peer_on_its_own_network_says_its_forwards(tmp_path):
    """Our network does not see them; without a number they stay unknown."""
    file = tmp_path / "own.py"
    file.write_text(
        "def counted(model, prompt, **options): return prompt, 7\n"
        "def silent(model, prompt, **options): return prompt\n"
    )
    peers = [word for f in ("counted", "silent") for word in ("--peer", f"{file}:{f}")]
    result = bench.measure(options_of("--modes", "lossless", *peers))
    own, counted, silent = result["modes"]
    assert (own["forwards"], counted["forwards"], silent["forwards"]) == (8, 7, None)
    assert counted["tokens_per_forward"] == 16 / 7
    assert silent["tokens_per_forward"] is None
    assert "?" in bench.table(result["modes"])


def test_sweep(tmp_path, capsys):
    """Every value in one file; a longer answer keeps the tokens per step."""
    out = tmp_path / "cost.json"
    arguments = f"--tiny --device cpu --repeats 1 --modes lossless,dual --out {out}"
    sweeps = ["--sweep", "answer=8,32", "--sweep", "batch=1,3"]
    assert bench.main([*arguments.split(), *sweeps]) == 0
    points = json.loads(out.read_text())["points"]
    sizes = [(p["answer"], p["batch"], p["steps"]) for p in points]
    assert sizes == [(8, 1, 4), (32, 1, 16), (16, 1, 8), (16, 3, 8)]
    for point in points:
        names = [mode["name"] for mode in point["modes"]]
        assert names == ["lossless", "dual"]
        assert {mode["forwards"] for mode in point["modes"]} == {point["steps"]}
    assert "answer 32 · batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["width=8", "answer", "answer=", "batch=1,0", "=1"])
def test_wrong_sweep(text):
    with pytest.raises(ValueError, match=f"sweep='{text}'"):
        bench.measure(options_of("--sweep", text))


# A block step against reading the weights


def test_weights_that_a_forward_reads():
    """Every parameter but the embedding table, unless that is the output layer too."""
    model = tiny_model()
    table = model.model.embed_tokens.weight.nbytes
    everything = sum(p.nbytes for p in model.parameters())
    assert roofline.weight_bytes(model) == everything - table
    tied = tiny_model(tie_word_embeddings=True)
    assert roofline.weight_bytes(tied) == everything - table


@torch.no_grad()
def test_block_step_is_the_cached_forward():
    """Nothing has changed since the cache was filled, so it is the plain forward."""
    model, ids = tiny_model().double(), torch.arange(20).view(2, 10) % 11
    token, logprob = roofline.block_step(model, ids, 3, 7)()
    law = model(ids).logits[:, 3:7].flatten(0, 1).log_softmax(-1)
    assert torch.equal(token, law.argmax(-1))
    torch.testing.assert_close(logprob.double(), law.amax(-1), rtol=0, atol=1e-5)


def test_step_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda device: 1e9)
    out = tmp_path / "step.json"
    assert bench.main(["--tiny", "--device", "cpu", "--step", "--out", str(out)]) == 0
    step = json.loads(out.read_text())["step"]
    fastest = min(step["eager_seconds"], step["graph_seconds"])
    assert step["read_seconds"] == step["bytes"] / 1e9
    assert step["ratio"] == pytest.approx(fastest / step["read_seconds"])


def test_bandwidth_counts_reading_and_writing(monkeypatch):
    monkeypatch.setattr(roofline, "seconds", lambda run, *_: run() is None or 0.5)
    assert roofline.copy_bandwidth(torch.device("cpu"), 1000) == 4000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_replayed_step_is_the_step():
    model = tiny_model().to("cuda")
    ids = torch.arange(20, device="cuda").view(2, 10) % 11
    step = roofline.block_step(model, ids, 3, 7)
    token, logprob = (part.clone() for part in step())
    for replayed in (graphed(step, "cuda")(), graphed(step, "cuda")()):
        assert torch.equal(replayed[0], token)
        torch.testing.assert_close(replayed[1], logprob)
