"""What measures compiled models and the machine that runs them, without the compiler."""
