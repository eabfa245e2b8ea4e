"""Linear attention with the feature map inside: features are never written to memory by the kernels."""

from seqmodels.ops.feature_attention.maps import FEATURE_MAPS, feature_width
from seqmodels.ops.feature_attention.op import FeatureState, feature_attention, feature_attention_step, feature_state

__all__ = [
    "FEATURE_MAPS",
    "FeatureState",
    "feature_attention",
    "feature_attention_step",
    "feature_state",
    "feature_width",
]
