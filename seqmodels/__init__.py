"""State-space and efficient sequence layers for PyTorch."""

from seqmodels.backends import BackendUnavailable, backend
from seqmodels.layout import Layout
from seqmodels.mixers import MIXERS, Mixer, MixerOutput, register_mixer
from seqmodels.state import State

__version__ = "0.1.0"
__all__ = ["MIXERS", "BackendUnavailable", "Layout", "Mixer", "MixerOutput", "State", "__version__", "backend", "register_mixer"]
