"""Which loss to train with on imbalanced images: the paper's experiment, with more losses and with intervals."""

from importlib.util import find_spec

_MODULES = ("captum", "filelock", "matplotlib", "numpy", "PIL", "scipy", "sklearn", "tqdm")
_absent = [name for name in _MODULES if not find_spec(name)]
if _absent:
    raise ImportError(f"benchmarks.accuracy needs {', '.join(_absent)}: pip install -e '.[accuracy]'")
