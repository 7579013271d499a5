"""K/V cache bookkeeping on the host: page pools, prefix tree, copy-on-write, eviction. No arrays, no device."""

from jaxinfer.cache.manager import Acquired, CacheManager, Cell, PageCopy
from jaxinfer.cache.pages import PoolUsage

__all__ = ["Acquired", "CacheManager", "Cell", "PageCopy", "PoolUsage"]
