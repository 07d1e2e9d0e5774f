"""What a bench needs the compiler for, far machines, and pictures; the rest: `runtime/bench/`."""
