"""Context extension: what keeping and what stretching the filters preserves, and that each does not do the other's."""

import pytest
import torch

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.extend import extended
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import ConversionError, from_published, to_published
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.implicit_filter import FilterShape, positional_features, time
from tests.compare import rel

OLD = ModelSection(max_seq_len=48, hidden_size=16, num_layers=2, filter_order=8, embed_dropout=0.0)
CPU = torch.device("cpu")


def model(section, dtype=torch.float32):
    """The same weights at every length: initial values are drawn by name."""
    built = HyenaModel(hyena_config(section, params_dtype=dtype))
    initialize(built, built.placement(), built.tensor, seed=0)
    return built.eval()


def filters(section, stop, dtype=torch.float64):
    """[D, stop] of the first layer."""
    with torch.no_grad():
        return model(section, dtype).layers[0].mixer.filter([slice(0, stop)])[0]


def tokens(length):
    return torch.randint(7, 11, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("how", "preserved"), [("keep", True), ("stretch", False)])
def test_short_inputs_keep_their_logits_bit_for_bit(how, preserved):
    new = model(extended(OLD, 200, filter=how))
    for length in (2, 17, 48):  # the first lag is everyone's
        error = rel(new(tokens(length)), model(OLD)(tokens(length)))
        print(f"{how}, {length} tokens: {error:.1e}, tolerance 0")
        assert (error == 0) == preserved
    long = new(tokens(200))
    assert long.isfinite().all()
    with pytest.raises(ValueError, match="at most max_seq_len = 200"):
        new(tokens(201))


@pytest.mark.parametrize("how", ["keep", "stretch"])
def test_the_longer_model_is_causal_and_uses_every_lag(how):
    """A change of the first token moves the last position, by the lags past the old length."""
    new, ids = model(extended(OLD, 200, filter=how), torch.float64), tokens(200)
    other = ids.clone()
    other[:, 0] = 17 - other[:, 0]
    assert rel(new(other)[:, -1], new(ids)[:, -1]) > 1e-9
    assert rel(new(ids[:, :150]), new(ids)[:, :150]) < 1e-12


@pytest.mark.parametrize(("how", "fails"), [("stretch", False), ("keep", True)])
def test_stretching_preserves_the_curve(how, fails):
    """h_new[k n] is h_old[n] but for t, which is less by less than 1 / S of itself: four times the length, a quarter
    of the difference. Measured at S = 64: 7.6e-3, 1.9e-3 at 256."""
    k, errors = 4, []
    for length in (64, 256, 1024):
        old = ModelSection(max_seq_len=length, hidden_size=16, filter_order=8)
        new = filters(extended(old, k * length, filter=how), k * length)[:, ::k]
        errors.append(rel(new, filters(old, length)))
    print(f"{how}: {errors}, bound 2 / S")
    assert all(error < 2 / length for error, length in zip(errors, (64, 256, 1024), strict=True)) != fails
    assert (errors[1] < 0.3 * errors[0] and errors[2] < 0.3 * errors[1]) != fails


def test_stretched_phases_are_exact_and_t_is_behind_as_stated():
    old, new, k = FilterShape(64, 5, 0.0), FilterShape(256, 5, 0.0), 4
    z_old = positional_features(old, slice(0, 64), torch.float64, CPU)
    z_new = positional_features(new, slice(0, 256), torch.float64, CPU)[::k]
    assert rel(z_new[:, 1:], z_old[:, 1:]) < 1e-7
    behind = 1 - z_new[1:, 0] / z_old[1:, 0]
    assert rel(behind, torch.full((63,), (256 - 64) / (64 * 255))) < 1e-4


@pytest.mark.parametrize("emb_dim", [3, 5, 9])
def test_positions_go_on_along_the_same_line(emb_dim):
    shape, stop = FilterShape(1026, emb_dim, 0.0), 5000
    t, z = (f(shape, slice(0, stop), torch.float32, CPU) for f in (time, positional_features))
    assert torch.equal(t[:1026], torch.linspace(0, 1, 1026)), "the published grid"
    assert torch.equal(z[:1026], positional_features(shape, slice(0, 1026), torch.float32, CPU))
    exact = torch.arange(stop, dtype=torch.float64)
    bands = torch.linspace(1e-4, (emb_dim - 1) // 2 - 1, (emb_dim - 1) // 2)
    phase = 2 * torch.pi * exact[:, None] / 1026 * bands.double()
    errors = [rel(t, exact / 1025), rel(z[:, 0], exact / 1025),
              rel(z[:, 1:], torch.cat([phase.cos(), -phase.sin()], 1))]
    print(f"errors {errors}, tolerances 1e-7, 1e-7, 3e-5; off by one lag is {1 / 5000:.0e}")
    assert max(errors[:2]) < 1e-7
    assert errors[2] < 3e-5
    steps = t.double().diff()
    assert rel(steps, torch.full_like(steps, 1 / 1025)) < 1e-3, "no seam"
    for lags in (slice(1000, 1100), slice(1025, 1026), slice(1026, 1027), slice(3000, 5000), slice(5000, 5000)):
        assert torch.equal(time(shape, lags, torch.float32, CPU), t[lags])
        assert torch.equal(positional_features(shape, lags, torch.float32, CPU), z[lags])


def test_only_lags_past_the_longest_input_are_zero():
    h = filters(extended(OLD, 100, filter="keep"), 130)
    assert (h[:, 48:100].abs().amax(0) > 0).all()
    assert (h[:, 100:] == 0).all()
    assert rel(h[:, :48], filters(OLD, 48)) < 1e-14
    with torch.no_grad():
        parts = model(extended(OLD, 100, filter="keep"), torch.float64).layers[0].mixer.filter(
            [slice(90, 110), slice(110, 120), slice(40, 60)])[0]
    assert rel(parts, torch.cat([h[:, 90:110], h[:, 110:120], h[:, 40:60]], 1)) < 1e-14


def test_the_sections():
    assert extended(OLD, 96, filter="keep").filter_seq_len == 48
    assert extended(extended(OLD, 96, filter="keep"), 192, filter="keep").filter_seq_len == 48
    assert extended(OLD, 96, filter="stretch").filter_seq_len == 96
    with pytest.raises(ConfigError, match=r"48 is no extension of model.max_seq_len \(48\)"):
        extended(OLD, 48, filter="keep")
    with pytest.raises(ConfigError, match="keep or stretch"):
        extended(OLD, 96, filter="streach")


def test_the_published_format_has_one_length():
    with pytest.raises(ConversionError, match=r"filter_seq_len \(48\) is less than .* \(96\).* l_max"):
        to_published(model(extended(OLD, 96, filter="keep")))
    stretched = model(extended(OLD, 96, filter="stretch"))
    again = from_published(*to_published(stretched))
    assert torch.equal(again(tokens(96)), stretched(tokens(96)))
