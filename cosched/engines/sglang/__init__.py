"""SGLang as an engine: plugins of the stock package, found through its entry points."""

# Environment variables that processes of a server are started with. Nothing is imported here: our
# plugin asks for the first of them in every process of every SGLang.
CONFIG = "COSCHED_CONFIG"  # a YAML file; without it nothing of ours happens
EVENTS = "COSCHED_EVENTS"  # a file that rank 0 appends every event to, rounds included
START = "COSCHED_START"  # the folder of this start, absolute: what is saved and history go there
RESUME = "COSCHED_RESUME"  # a saved state, absolute, to go on from
RUN = "COSCHED_RUN"  # a folder of the server's; absent where our launcher did not start it
