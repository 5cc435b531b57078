"""Language models with a change that is no option: other slopes, and the variants of streams."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from experiment import LanguageModelling
from lab.command_line import parse
from lab.presets import PRESETS
from lab.run import count_parameters
from lab.synthetic import sample_sentences
from research import slope, variants

FLAGS = "--preset small --protocol stream --corpus text --embedding 8 --hidden 8 --batch-size 4 --bptt 5 --device cpu"


@pytest.fixture
def flags(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, seed in (("train", 1), ("valid", 2), ("test", 3)):
        (folder / f"{split}.txt").write_text("\n".join(map(" ".join, sample_sentences(40, seed=seed))) + "\n")
    return [*FLAGS.split(), "--data", str(folder)]


def outputs(model: torch.nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Logits of the words read in two pieces."""
    first, state = model(words[:, :3])
    return torch.cat([first, model(words[:, 3:], state)[0]], dim=1).detach()


WORDS = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steepness", [1, 2, 3])
def test_a_slope_is_a_scale_of_the_candidate(flags, steepness):
    config = parse([*flags, "--activation", "shifted_softplus"], PRESETS)
    plain = LanguageModelling(config).build("qrnn").eval()
    sloped = slope.SlopeModelling(config, 1, steepness).build("qrnn").eval()
    assert torch.equal(outputs(plain, WORDS), outputs(sloped, WORDS)) == (steepness == 2)
    with torch.no_grad():
        for layer in plain.rnn.layers:
            layer.weight[:8] *= steepness / 2
            layer.bias[:8] *= steepness / 2
    torch.testing.assert_close(outputs(sloped, WORDS), outputs(plain, WORDS))


@pytest.mark.parametrize("name", ["qrnn", "lstm"])
def test_a_stack_of_single_layers_is_the_model(flags, name):
    config = parse([*flags, "--first-kernel-size", "1"], PRESETS)
    plain = LanguageModelling(config).build(name)
    changed = variants.VariantModelling(config, 1, ["locked"]).build(name)
    torch.testing.assert_close(outputs(changed.eval(), WORDS), outputs(plain.eval(), WORDS))


def test_a_locked_mask_is_the_same_at_all_steps():
    x = variants.LockedDropout(0.5)(torch.ones(4, 6, 8))
    assert torch.equal(x, x[:, :1].expand_as(x)) and set(x.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(x[0], x[1])


def test_a_skip_connection_adds_the_input(flags):
    config = parse([*flags, "--dropout", "0"], PRESETS)
    plain, changed = (variants.VariantModelling(config, 1, [what]).build("qrnn").rnn for what in ("locked", "skip"))
    x = torch.randn(2, 5, 8)
    first, _ = plain.layers[0](x)
    torch.testing.assert_close(changed(x)[0], plain(x)[0] + first)


@pytest.mark.parametrize("name", ["qrnn", "lstm"])
def test_larger_candidates_are_those_of_scaled_weights(flags, name):
    uniform, scaled = (parse([*flags, "--initialisation", value], PRESETS) for value in ("uniform", "scaled"))
    changed = variants.VariantModelling(uniform, 1, ["gain"]).build(name).state_dict()
    for key, parameter in LanguageModelling(scaled).build(name).state_dict().items():
        assert torch.equal(changed[key], parameter), key


@pytest.mark.parametrize("name", ["qrnn", "lstm"])
def test_forget_biases_spread_over_time_scales(flags, name):
    model = variants.VariantModelling(parse([*flags, "--hidden", "64"], PRESETS), 1, ["spread"]).build(name)
    biases = [bias for key, bias in model.rnn.named_parameters() if "bias_ih" in key or key.endswith("bias")]
    for bias in biases:
        gates = bias[model.hidden : 2 * model.hidden].sigmoid()
        scales = 1 / (1 - gates)
        assert len(biases) == 2 and 2 <= scales.min() < 15 and 55 < scales.max() <= variants.LONGEST


def test_evaluation_takes_the_mean_of_the_weights(flags):
    config = parse(flags, PRESETS)
    task = variants.VariantModelling(config, 1, ["average"])
    model, steps = task.build("lstm"), len(task.train)
    assert count_parameters(model) == count_parameters(LanguageModelling(config).build("lstm"))
    mean = model.model.softmax_bias.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.model.softmax_bias += step
        mean = mean if step == 0 else mean + (model.model.softmax_bias.detach() - mean) / steps
        model.train()(WORDS)
    torch.testing.assert_close(model.average.module.softmax_bias, mean)
    assert torch.equal(outputs(model.eval(), WORDS), outputs(model.average.module.eval(), WORDS))


def test_a_run_with_averaged_weights_keeps_them(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert variants.main(["average", *flags, "--epochs", "2", "--models", "qrnn", "--name", "run"]) == 0
    *_, last = sorted((tmp_path / "runs" / "run" / "qrnn").glob("best-*"))
    names = {*load_file(last / "weights.safetensors")}
    assert {f"average.module.{name.removeprefix('model.')}" for name in names if name.startswith("model.")} < names


def test_a_quarter_is_the_start_of_each_row(flags):
    config = parse(flags, PRESETS)
    whole, quarter = LanguageModelling(config), variants.VariantModelling(config, 1, ["quarter"])
    assert quarter.train.tokens == quarter.fingerprint["train_tokens"] == 4 * (whole.train.tokens // 16)
    (first, *_), (same, *_) = whole.train.epoch(0), quarter.train.epoch(0)
    assert torch.equal(first.inputs, same.inputs)
    assert sum(batch.inputs.numel() for batch in quarter.train.epoch(0)) == quarter.train.tokens


def test_wrong_changes_are_named(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module, wrong in (
        (variants, ["quarter,none", *flags]),
        (variants, ["quarter", "--demo"]),
        (variants, ["skip", *flags, "--dense"]),
        (slope, ["0", *flags]),
    ):
        assert module.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
