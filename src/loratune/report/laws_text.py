"""Laws and the check of the lemma in plain words, for the terminal."""

import math
from collections.abc import Sequence

from loratune.analyse.laws.learning_rate import LearningRateLaw
from loratune.analyse.laws.report import Laws, LearningRateFinding, LossFinding, OptimumFinding
from loratune.analyse.lemma import LemmaCheck

_AXES = {"rows": "the number of training rows", "rank": "the rank", "model": "the model's size"}
_SHAPES = {"power": "p", "surge": "Bn", "saturation": "Bn"}


def laws_text(laws: Laws) -> str:
    """Every law with its interval, and beside each what could not be concluded and what to run."""
    loud = " SELECTED ON THE TEST SET." if laws.select_on == "test" else ""
    parts = [f"Learning rates chosen by {laws.metric.replace('_', ' ')}.{loud}"]
    parts += [_learning_rate(one) for one in laws.learning_rate]
    parts += [_loss(one) for one in laws.loss]
    parts += [_optimum(one) for one in laws.optimal_batch_size]
    if laws.not_varied:
        parts.append(
            "Not varied by this study, so that nothing is said of the best batch size against: "
            f"{', '.join(_AXES[axis] for axis in laws.not_varied)}."
        )
    return "\n\n".join(parts)


def lemma_text(check: LemmaCheck) -> str:
    """Simulated beside stated, and what it means."""
    lines = [
        f"Lemma 4.1, rank {check.rank}, {check.samples:,} samples, {check.replicates:,} replicates "
        f"(seed {check.seed})",
        f"  mean    simulated {_number(check.mean)}{_range(check.mean_low, check.mean_high)}, "
        f"r N / (r - 2) = {_number(check.formula_mean)}",
        f"  median  simulated {_number(check.median)}{_range(check.median_low, check.median_high)}"
        f", r N / median(chi2_r) = {_number(check.formula_median)}",
    ]
    if check.plugin is not None:
        one = check.plugin
        lines.append(
            f"  with a true noise scale of {one.true_noise_scale:g}: median simulated "
            f"{_number(one.median)}{_range(one.median_low, one.median_high)}, "
            f"1 / (1 / B_true + 1 / N) = {_number(one.formula)}"
        )
    return "\n".join([*lines, *(f"{remark[0].upper()}{remark[1:]}." for remark in check.remarks)])


def _learning_rate(one: LearningRateFinding) -> str:
    lines = [f"{one.setting}: best learning rate against batch size"]
    if one.batch_sizes:
        pairs = zip(one.batch_sizes, one.learning_rates, strict=True)
        lines.append("  " + ", ".join(f"{size}: {rate:.2g}" for size, rate in pairs))
    if one.left_out:
        lines.append(
            f"  left out, best rate at an edge or beside a gap: {', '.join(map(str, one.left_out))}"
        )
    if one.fit is not None:
        lines += [
            f"  {'*' if law.name == one.fit.chosen else ' '} {_law(law)}" for law in one.fit.laws
        ]
        close = f"; not excluded: {', '.join(one.fit.not_excluded)}" if one.fit.not_excluded else ""
        lines.append(f"  * lowest AICc{close}")
    return "\n".join([*lines, *_open_ends(one.undecided, one.run_next)])


def _law(law: LearningRateLaw) -> str:
    shape = ""
    if law.name in _SHAPES:
        known = "not bounded" if law.shape is None else f"{law.shape:.3g}"
        shape = f", {_SHAPES[law.name]} = {known}{_range(law.shape_low, law.shape_high)}"
    missed = (
        "" if law.left_out_factor is None else f", largest left out: x{law.left_out_factor:.2f}"
    )
    trusted = "" if law.trusted_up_to is None else f", trusted up to {law.trusted_up_to:.0f}"
    difference = "-" if law.aicc_difference is None else f"{law.aicc_difference:.1f}"
    return (
        f"{law.formula}: s = {law.scale:.3g}{shape}, residual x{law.residual_factor:.2f}, "
        f"AICc +{difference}{missed}{trusted}"
    )


def _loss(one: LossFinding) -> str:
    where = f"{one.setting}: " if one.setting else ""
    lines = [f"{where}loss over batch size M and updates K"]
    if one.left_out:
        lines.append(
            "  left out, without a best rate inside those tried or a second seed: "
            f"{', '.join(map(str, one.left_out))}"
        )
    if one.fit is not None:
        terms = [f"{one.fit.floor:.4g}"]
        if one.fit.batch_exponent is not None:
            terms.append(f"{one.fit.batch_scale:.3g} / M^{one.fit.batch_exponent:.3g}")
        if one.fit.steps_exponent is not None:
            terms.append(f"{one.fit.steps_scale:.3g} / K^{one.fit.steps_exponent:.3g}")
        lines.append(
            f"  L = {' + '.join(terms)}, residual {one.fit.residual:.2g}, "
            f"{one.fit.num_points} losses"
        )
        if one.lack_of_fit is not None:
            lines.append(f"  that seeds explain what it leaves: p = {one.lack_of_fit:.2g}")
        if one.fit.left_out_error is not None:
            lines.append(f"  largest batch size left out: off by {one.fit.left_out_error:+.3g}")
    if one.optimum is not None:
        lines.append(
            f"  best batch size at {one.optimum.samples:,.0f} samples: "
            f"{one.optimum.batch_size:.3g}{_range(one.optimum.low, one.optimum.high)}"
        )
    if one.tried_best is not None:
        lines.append(f"  best batch size tried there: {one.tried_best}")
    lines += [f"  assumed: {text}" for text in one.assumed]
    return "\n".join([*lines, *_open_ends(one.undecided, one.run_next)])


def _optimum(one: OptimumFinding) -> str:
    where = f"{one.setting}: " if one.setting else ""
    lines = [f"{where}best batch size against {_AXES[one.axis]}"]
    for value in one.values:
        if value.batch_size is not None:
            said = f"{value.batch_size:.3g} ({value.num_seeds} seeds)"
        elif value.at_edge is not None:
            said = f"{value.tried_best}, at the {value.at_edge} tried"
        else:
            said = "not known"
        lines.append(f"  {value.value}: {said}")
    fit = one.fit
    if fit is not None:
        lines.append(
            f"  {fit.dependence}: over the range studied the best batch size changes by a factor "
            f"of {2**fit.log2_ratio:.2f}{_range(2**fit.ratio_low, 2**fit.ratio_high)}; exponent "
            f"{fit.exponent:.2f}{_range(fit.exponent_low, fit.exponent_high)}"
        )
        if fit.dependence == "does not depend":
            lines.append(
                "  (90% interval within a factor of two: "
                f"{2**fit.ratio_low90:.2f} to {2**fit.ratio_high90:.2f}; no further than the range)"
            )
    lines += [f"  assumed: {text}" for text in one.assumed]
    return "\n".join([*lines, *_open_ends(one.undecided, one.run_next)])


def _open_ends(undecided: Sequence[str], run_next: Sequence[str]) -> list[str]:
    lines = [f"  cannot be concluded: {reason}" for reason in undecided]
    return lines + [f"  to run: {text}" for text in run_next]


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f" (95%: {_end(low)} to {_end(high)})"


def _end(value: float | None) -> str:
    return "open" if value is None else _number(value)


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.1f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.4g}"
