"""SGLang started so that the draft adapts: its arguments, its processes, its end."""
