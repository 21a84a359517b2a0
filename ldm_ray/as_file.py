"""What a command that is run as a file imports first: ``python ldm_ray/train.py``, an editor's run button.

Python puts the file's folder first on the path. Its ``inspect.py`` would then stand in for the standard library's, and
the package itself might not be found; its parent belongs there. Ray's workers go by PYTHONPATH.
"""

from __future__ import annotations

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.abspath(path) != HERE)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
