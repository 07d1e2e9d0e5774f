"""What `osscompile run MODEL` compiled, kept for the next time.

The cache is the folder that OSSCOMPILE_CACHE names, or else the user's own. A folder in it is an
entry: what it was compiled of (`entry.json`), and the artifact. Its name ends with a digest of all
that decides what the artifact is: the checkpoint's state, adapters, target, profile, records of
tuning, and the compiler's code. So a change of any of them compiles again, beside what was there.

Nothing is removed by itself: an older checkpoint or version may be wanted still. Whoever compiles
again is told what is stale and how large, `osscompile list` marks it, `osscompile rm --stale`
removes it. A process that runs an artifact has it mapped, or on its GPU: to remove it then is safe.
"""
