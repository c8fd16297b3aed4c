"""The rules by which sizes and steps follow from pictures, hardware and one dial."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Survey:
    """What a look at a source found: the numbers that the rules read."""

    pictures: int  # usable, as estimated
    counted: bool  # whether that is exact
    looked: int  # pictures that were opened
    bad: float  # share of those that cannot be used
    side: float  # median shorter side, pixels
    longer: float  # median of longer side / shorter side
    lossy: float  # share of JPEG
    transparent: float  # share of pictures with transparent pixels
    captions: int  # distinct ones, as estimated for all pictures
    words: int  # distinct ones in the captions that were looked at
    length: float  # mean number of words in a caption
    seconds: float  # that one core takes to decode a picture and resize it
