"""SGLang as an engine: plugins of the stock package, found through its entry points."""
