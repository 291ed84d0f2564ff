"""Figures hold the numbers they claim to show."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import results

from expertsteer_lens.errors import ArgumentError, ExpertSteerError
from expertsteer_lens.show import drawing, plots

pytest.importorskip("plotly")


def rectangles(figure):
    """Outlined cells as (expert layer, target layer)."""
    return {
        (s.y0 + 0.5, s.x0 + 0.5)
        for s in figure.layout.shapes
        if s.type == "rect" and s.x1 - s.x0 == 1
    }


def trace(figure, name):
    return next(t for t in figure.data if t.name == name)


class TestLayerPairMI:
    def test_cells_are_the_matrix_expert_by_target(self):
        mi = results.layer_pair_mi()
        figure = plots.plot_layer_pair_mi(mi)
        assert [list(row) for row in figure.data[0].z] == mi.matrix.tolist()
        assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "3"]
        assert list(figure.layout.yaxis.ticktext) == ["0", "1", "2"]
        assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == (
            "target layer",
            "expert layer",
        )
        assert figure.data[0].colorbar.title.text == "nats"

    def test_the_title_names_estimator_samples_and_null(self):
        text = plots.plot_layer_pair_mi(results.layer_pair_mi()).layout.title.text
        assert "cca, n = 77" in text
        assert "permutation null 0.270 nats" in text
        assert "outlined" not in text
        of_tokens = replace(results.layer_pair_mi(), n_groups=11)
        assert "n = 77 in 11 texts" in plots.plot_layer_pair_mi(of_tokens).layout.title.text

    def test_titles_state_what_was_found(self):
        mi, pairs = results.layer_pair_mi(), results.layer_pairs()
        top = f"{float(mi.matrix.max()):.2f} nats"
        title = plots.plot_layer_pair_mi(mi).layout.title.text
        assert title.startswith(f"Expert layer 2 and target layer 3 share most: {top}<br>")
        title = plots.plot_layer_pairs(pairs).layout.title.text
        score = f"{pairs[0].score:+.2f}"
        assert title.startswith(f"Expert layer 2 → target layer 3 ({score}) and 1 more, of 9 pairs")

    def test_hovering_tells_interval_and_null(self):
        hover = plots.plot_layer_pair_mi(results.layer_pair_mi()).data[0].text[1][2]
        assert (
            "expert blocks.1.hook_resid_post<br>target blocks.2.hook_resid_post<br>0.750 nats"
            in hover
        )
        assert "interval 0.688 to 0.875" in hover
        assert "null 0.270 ± 0.016" in hover

    def test_chosen_pairs_are_outlined(self):
        figure = plots.plot_layer_pair_mi(
            results.layer_pair_mi(), layer_pairs=results.layer_pairs()
        )
        assert rectangles(figure) == {(2, 3), (0, 1)}
        assert "outlined: chosen" in figure.layout.title.text

    def test_excess_takes_off_the_null(self):
        mi = results.layer_pair_mi()
        figure = plots.plot_layer_pair_mi(mi, what="excess")
        assert figure.data[0].z[2][3] == pytest.approx(float(mi.matrix[2, 3]) - 0.27)
        assert "minus its permutation null" in figure.layout.title.text

    def test_without_a_null_none_is_claimed(self):
        mi = results.layer_pair_mi(n_permutations=0)
        figure = plots.plot_layer_pair_mi(mi)
        assert "no permutation null was drawn" in figure.layout.title.text
        assert "null" not in figure.data[0].text[0][0]
        assert "nan" not in figure.to_json().lower()
        with pytest.raises(ArgumentError, match="what='excess' needs a null"):
            plots.plot_layer_pair_mi(mi, what="excess")

    def test_a_score_without_a_unit_is_not_called_nats(self):
        figure = plots.plot_layer_pair_mi(results.layer_pair_mi(estimator="cka"))
        assert figure.data[0].colorbar.title.text == "cka"
        assert "nats" not in figure.to_json()

    def test_unknown_quantities_are_refused(self):
        with pytest.raises(ArgumentError, match="what must be one of"):
            plots.plot_layer_pair_mi(results.layer_pair_mi(), what="p")

    def test_numbers_are_written_into_small_grids_only(self):
        assert (
            plots.plot_layer_pair_mi(results.layer_pair_mi(10, 20)).data[0].texttemplate
            == "%{z:.2f}"
        )
        assert plots.plot_layer_pair_mi(results.layer_pair_mi(32, 32)).data[0].texttemplate is None

    def test_results_plot_themselves(self):
        mi = results.layer_pair_mi()
        assert (
            mi.plot(what="excess").to_json()
            == plots.plot_layer_pair_mi(mi, what="excess").to_json()
        )


class TestLayerPairs:
    def test_cells_are_the_scores_and_blank_where_the_rule_did_not_look(self):
        pairs = results.layer_pairs()
        figure = plots.plot_layer_pairs(pairs)
        for i, row in enumerate(figure.data[0].z):
            assert row[0] is None
            assert list(row[1:]) == pairs.scores[i, 1:].tolist()
        assert rectangles(figure) == {(2, 3), (0, 1)}

    def test_signed_scores_get_colours_symmetric_about_zero(self):
        figure = plots.plot_layer_pairs(results.layer_pairs())
        largest = float(results.layer_pairs().scores.nan_to_num().abs().max())
        assert (figure.data[0].zmin, figure.data[0].zmax) == (-largest, largest)
        assert "predicted effect" in figure.layout.title.text
        assert plots.plot_layer_pairs(results.layer_pairs(rule="min_mi")).data[0].zmin is None

    def test_other_hook_points_keep_their_kind_in_the_label(self):
        assert drawing.layer_label("blocks.3.hook_mlp_out") == "3 mlp_out"
        assert drawing.layer_label("embed") == "embed"


class TestDoseResponse:
    def test_curves_are_effect_left_and_cost_right(self):
        curve = results.calibration()
        figure = plots.plot_dose_response(curve)
        xs = [r["coefficient"] for r in curve.curve]
        effect, cost = trace(figure, "effect (nats)"), trace(figure, "cost: NLL per token (nats)")
        assert (list(effect.x), list(effect.y)) == (xs, [r["effect"] for r in curve.curve])
        assert (list(cost.x), list(cost.y)) == (xs, [r["cost"] for r in curve.curve])
        assert (effect.yaxis, cost.yaxis) == (None, "y2")
        assert figure.layout.yaxis2.side == "right"

    def test_shaded_is_what_the_budget_allows_from_zero_outwards(self):
        """The dip of the cost at 0.4, beyond 0.3 where it exceeded the budget, is not shaded."""
        shapes = plots.plot_dose_response(results.calibration()).layout.shapes
        band = next(s for s in shapes if s.type == "rect")
        assert (band.x0, band.x1) == (-0.1, 0.2)

    def test_the_chosen_coefficient_is_marked_above_the_axes(self):
        figure = plots.plot_dose_response(results.calibration())
        line = next(s for s in figure.layout.shapes if s.type == "line")
        assert line.x0 == line.x1 == 0.2
        note = figure.layout.annotations[0]
        assert (note.text, note.yanchor, note.y) == ("chosen 0.2", "bottom", 1)

    def test_without_a_behaviour_the_cost_has_the_left_axis(self):
        figure = plots.plot_dose_response(results.calibration(effect=False))
        assert len(figure.data) == 1
        assert figure.data[0].yaxis == "y"
        assert figure.layout.yaxis.title.text == "cost, nats per token"


class TestEvaluation:
    def test_every_method_stands_at_its_effect_with_its_interval(self):
        result = results.evaluation()
        figure = plots.plot_evaluation(result)
        frame = result.to_pandas().set_index("method")
        drawn = {t.y[0]: t for t in figure.data if t.y[0] is not None}
        assert set(drawn) == set(frame.index)
        for method, t in drawn.items():
            assert t.x[0] == pytest.approx(frame.effect[method])
            assert t.x[0] + t.error_x.array[0] == pytest.approx(frame.high[method])
            assert t.x[0] - t.error_x.arrayminus[0] == pytest.approx(frame.low[method])

    def test_the_band_is_two_standard_deviations_of_the_floor(self):
        result = results.evaluation()
        mean, sd = result.floor
        band = next(s for s in plots.plot_evaluation(result).layout.shapes if s.type == "rect")
        assert (band.x0, band.x1) == (pytest.approx(mean - 2 * sd), pytest.approx(mean + 2 * sd))
        assert sd == pytest.approx(0.2)

    def test_the_line_is_the_better_native_method(self):
        figure = plots.plot_evaluation(results.evaluation())
        line = next(s for s in figure.layout.shapes if s.type == "line")
        assert line.x0 == line.x1 == 1.25
        without = plots.plot_evaluation(results.evaluation(ceiling=False))
        assert not [s for s in without.layout.shapes if s.type == "line"]
        assert {t.name for t in without.data if t.showlegend is not False} == {
            "random floor ± 2 sd"
        }

    def test_nothing_is_written_where_markers_are(self):
        figure = plots.plot_evaluation(results.evaluation())
        assert not figure.layout.annotations
        assert figure.layout.legend.yanchor == "bottom"
        assert figure.layout.legend.y == 1.0
        named = {t.name for t in figure.data if t.showlegend is not False}
        assert named == {"random floor ± 2 sd", "native ceiling"}

    def test_the_budget_is_named_with_its_unit(self):
        result = results.evaluation()
        assert "rise of NLL ≤ 0.1 nats per token" in plots.plot_evaluation(result).layout.title.text
        result.provenance["budget_unit"] = "kl"
        assert "KL to the unsteered model ≤ 0.1" in plots.plot_evaluation(result).layout.title.text

    def test_the_unsteered_model_is_the_axis_not_a_method(self):
        from dataclasses import replace

        result = results.evaluation()
        with_base = replace(
            result,
            rows=(
                replace(result.rows[0], method="unsteered", role="base", effect=0.0),
                *result.rows,
            ),
        )
        drawn = [t.y[0] for t in plots.plot_evaluation(with_base).data]
        assert "unsteered" not in drawn
        assert len(drawn) == len(plots.plot_evaluation(result).data)

    def test_a_role_that_is_not_ours_is_drawn_too(self):
        from dataclasses import replace

        result = results.evaluation()
        own = replace(result.rows[0], method="mine", role="my own role")
        figure = plots.plot_evaluation(replace(result, rows=(*result.rows, own)))
        marker = next(t for t in figure.data if t.y[0] == "mine")
        assert marker.marker.color == drawing.OTHER not in drawing.ROLE_COLOURS.values()

    def test_the_plan_is_first_from_above(self):
        figure = plots.plot_evaluation(results.evaluation())
        order = [t.y[0] for t in figure.data if t.y[0] is not None]
        assert order[-1] == "this plan"

    def test_figures_hold_finite_numbers_only(self):
        for figure in (
            plots.plot_evaluation(results.evaluation()),
            plots.plot_dose_response(results.calibration()),
        ):
            for t in figure.data:
                assert all(v is None or math.isfinite(v) for v in t.x)


def test_without_plotly_the_remedy_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ExpertSteerError, match=r"pip install 'expertsteer-lens\[plot\]'"):
        plots.plot_evaluation(results.evaluation())
