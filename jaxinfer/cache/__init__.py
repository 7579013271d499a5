"""K/V cache bookkeeping on the host: page pools, prefix tree, copy-on-write, eviction. No arrays, no device."""

from jaxinfer.cache.manager import Acquired, CacheManager
from jaxinfer.cache.pages import Cell, PageCopy, PoolUsage

__all__ = ["Acquired", "CacheManager", "Cell", "PageCopy", "PoolUsage"]
