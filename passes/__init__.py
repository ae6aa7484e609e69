"""The passes, by name."""

from zeroskip.passes.allocate_sparsity import AllocateSparsity
from zeroskip.passes.apply_masks import ApplyMasks
from zeroskip.passes.base import Pass, PassResult
from zeroskip.passes.compensate_energy import CompensateEnergy
from zeroskip.passes.distill_outputs import DistillOutputs
from zeroskip.passes.eliminate_dead_code import EliminateDeadCode
from zeroskip.passes.export_onnx import ExportOnnx
from zeroskip.passes.find_scale_groups import FindScaleGroups
from zeroskip.passes.fold_constants import FoldConstants
from zeroskip.passes.fold_scales import FoldScales
from zeroskip.passes.induce_sparsity import InduceSparsity
from zeroskip.passes.lower_masked import LowerMasked
from zeroskip.passes.lower_semi_structured import LowerSemiStructured
from zeroskip.passes.lower_sparse_linear import LowerSparseLinear
from zeroskip.passes.manager import PassManager, PipelineResult
from zeroskip.passes.materialize_elastic import MaterializeElastic
from zeroskip.passes.observe import Observe
from zeroskip.passes.pattern_pass import PatternPass
from zeroskip.passes.permute_channels import PermuteChannels
from zeroskip.passes.prune_alps import PruneALPS
from zeroskip.passes.prune_cvr import PruneCVR
from zeroskip.passes.prune_magnitude import PruneMagnitude
from zeroskip.passes.prune_ria import PruneRIA
from zeroskip.passes.prune_sparsegpt import PruneSparseGPT
from zeroskip.passes.prune_wanda import PruneWanda
from zeroskip.passes.prune_z import PruneZ
from zeroskip.passes.pruner import Pruner
from zeroskip.passes.quantize_values import QuantizeValues
from zeroskip.passes.reconstruct_blocks import ReconstructBlocks
from zeroskip.passes.record_passes import DumpPrograms, Instrument, PassRecord
from zeroskip.passes.refine_dsnot import RefineDSnoT
from zeroskip.passes.shift_to_bias import ShiftToBias
from zeroskip.passes.steer_scores import SteerScores
from zeroskip.passes.train_elastic import TrainElastic
from zeroskip.passes.trainer import Trainer
from zeroskip.passes.updating_pruner import UpdatingPruner

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        FindScaleGroups,
        Observe,
        FoldScales,
        InduceSparsity,
        SteerScores,
        AllocateSparsity,
        PermuteChannels,
        PruneMagnitude,
        PruneSparseGPT,
        PruneWanda,
        PruneZ,
        PruneCVR,
        PruneRIA,
        PruneALPS,
        RefineDSnoT,
        ShiftToBias,
        CompensateEnergy,
        ApplyMasks,
        ReconstructBlocks,
        DistillOutputs,
        TrainElastic,
        MaterializeElastic,
        QuantizeValues,
        LowerMasked,
        LowerSparseLinear,
        LowerSemiStructured,
        FoldConstants,
        EliminateDeadCode,
        ExportOnnx,
    )
}

__all__ = [
    "PASSES",
    "AllocateSparsity",
    "ApplyMasks",
    "CompensateEnergy",
    "DistillOutputs",
    "DumpPrograms",
    "EliminateDeadCode",
    "ExportOnnx",
    "FindScaleGroups",
    "FoldConstants",
    "FoldScales",
    "InduceSparsity",
    "Instrument",
    "LowerMasked",
    "LowerSemiStructured",
    "LowerSparseLinear",
    "MaterializeElastic",
    "Observe",
    "Pass",
    "PassManager",
    "PassRecord",
    "PassResult",
    "PatternPass",
    "PermuteChannels",
    "PipelineResult",
    "PruneALPS",
    "PruneCVR",
    "PruneMagnitude",
    "PruneRIA",
    "PruneSparseGPT",
    "PruneWanda",
    "PruneZ",
    "Pruner",
    "QuantizeValues",
    "ReconstructBlocks",
    "RefineDSnoT",
    "ShiftToBias",
    "SteerScores",
    "TrainElastic",
    "Trainer",
    "UpdatingPruner",
]
