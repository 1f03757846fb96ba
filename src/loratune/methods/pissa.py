"""PiSSA (Meng et al. 2024, arXiv 2404.02948): starts from the top r singular components.

A0 = sqrt(S/scale) Vh and B0 = U sqrt(S/scale) over the r largest singular values. `niter` is null
for the exact decomposition; a number asks for the fast one (randomised subspace iteration, Halko et
al. 2011, algorithm 5.1, no oversampling) of the paper's code, which used 16. The paper's code draws
its random start from the global seed; ours is fixed by the layer's name, so that one base has one
start and the trial's seed moves data order and dropout alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune.methods.base import LayerTensors, number_option
from loratune.methods.corrected import (
    Factors,
    qr,
    singular_triplets,
    split_evenly,
    start_corrected,
)
from loratune.methods.lora_method import LoraMethod
from loratune.methods.peft_adapter import generator
from loratune.records import Trial


def start_pissa(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str]
) -> dict[str, LayerTensors]:
    """Top singular components; see `methods.corrected.start_corrected`."""
    exact = dict(trial.method.options).get("niter") is None
    niter = None if exact else int(number_option(trial.method, "niter", above=0))

    def factorise(weight_ED: Tensor, name: str) -> Factors:
        if niter is None:
            u, s, vh = singular_triplets(weight_ED)
        else:
            u, s, vh = fast_svd(weight_ED, rank=trial.rank, niter=niter, name=name)
        r = trial.rank
        return split_evenly(u[:, :r], s[:r], vh[:r], scale=trial.scale)

    return start_corrected(model, trial, targets, factorise=factorise)


def fast_svd(
    weight_ED: Tensor, *, rank: int, niter: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets (U_ER, S_R, Vh_RD), nearly; torch.svd_lowrank's steps.

    The random start comes from a generator of the name, where torch's comes from global state.
    """
    wide = weight_ED.shape[0] < weight_ED.shape[1]
    tall_MN = weight_ED.T if wide else weight_ED
    start_NR = torch.randn(tall_MN.shape[1], rank, generator=generator(0, f"{name}:fast-svd"))
    q_MR, _ = qr(tall_MN @ start_NR.to(weight_ED))
    for _ in range(niter):
        q_NR, _ = qr(tall_MN.T @ q_MR)
        q_MR, _ = qr(tall_MN @ q_NR)
    u_RR, s_R, vh_RN = singular_triplets(q_MR.T @ tall_MN)
    u_MR = q_MR @ u_RR
    return (vh_RN.T, s_R, u_MR.T) if wide else (u_MR, s_R, vh_RN)


METHOD = LoraMethod(start_pissa)
