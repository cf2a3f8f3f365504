"""Render Twemoji's animals for the quickstart, whose natural shift they are: the same classes by another artist.

    python benchmarks/emojishift/other_artist.py

Writes integrations/quickstart/twemoji_animals.npz (CC BY 4.0, see NOTICE) and prints its checksum for data.py. The quickstart
needs no network, and no package on PyPI carries a second artist's drawings.
"""

import hashlib
from pathlib import Path

import numpy as np
from artists import artist_drawings

from geomreg.integrations.quickstart.experiment import TARGET, subset

PATH = Path(__file__).resolve().parents[2] / "integrations" / "quickstart" / "twemoji_animals.npz"

if __name__ == "__main__":
    drawings = subset(artist_drawings("twemoji"), (TARGET,))
    np.savez_compressed(PATH, codes=np.array(drawings.codes), images=drawings.images.numpy())
    print(len(drawings.codes), "drawings,", PATH.stat().st_size, "bytes,", hashlib.sha256(PATH.read_bytes()).hexdigest())
