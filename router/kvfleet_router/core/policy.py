"""What a routing policy is. (skeleton)"""

from __future__ import annotations


class Policy: ...
