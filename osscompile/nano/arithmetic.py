"""Sums and differences, the ways to ask for them, and column arithmetic as an analysis."""

from random import Random

from osscompile.nano.held_out import draw_until

OPERATION_WORDS = {
    "+": (
        "What is {a} + {b}?",
        "{a} + {b}",
        "{a}+{b}",
        "{a} + {b} =",
        "{a} + {b} = ?",
        "Add {a} and {b}.",
        "What is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
        "Compute {a} + {b}.",
        "Calculate {a} + {b}.",
        "Please compute {a} + {b}.",
        "How much is {a} + {b}?",
        "How much is {a} plus {b}?",
        "I have {a} coins and get {b} more. How many coins do I have?",
    ),
    "-": (
        "What is {a} - {b}?",
        "{a} - {b}",
        "{a}-{b}",
        "{a} - {b} =",
        "{a} - {b} = ?",
        "Subtract {b} from {a}.",
        "What is {a} minus {b}?",
        "Take {b} from {a}.",
        "Compute {a} - {b}.",
        "Calculate {a} - {b}.",
        "Please compute {a} - {b}.",
        "How much is {a} - {b}?",
        "How much is {a} minus {b}?",
        "I have {a} coins and lose {b}. How many coins do I have?",
    ),
}


def draw_sum(
    rng: Random, held_out: bool, three_digits: float = 0.0
) -> tuple[str, str, tuple[int, str, int]]:
    """Return question, final answer, (a, operation, b); three-digit numbers are never held out."""
    operation = rng.choice("+-")
    large = not held_out and rng.random() < three_digits

    def draw() -> tuple[int, int]:
        if large:
            pair = rng.randint(100, 999), rng.randint(0, 999)
        else:
            pair = rng.randint(0, 99), rng.choice((rng.randint(0, 99), rng.randint(0, 9)))
            pair = pair if rng.random() < 0.5 else (pair[1], pair[0])
        return (max(pair), min(pair)) if operation == "-" else pair

    a, b = draw_until(held_out, draw, lambda pair: f"{min(pair)} {max(pair)}")
    result = a + b if operation == "+" else a - b
    question = rng.choice(OPERATION_WORDS[operation]).format(a=a, b=b)
    return question, f"{a} {operation} {b} = {result}.", (a, operation, b)


def explain_columns(a: int, operation: str, b: int, effort: str) -> str:
    """Explain columns from the units up: a line (low), its result (medium), sentences (high)."""
    width = max(len(str(a)), len(str(b)))
    carry, columns, sentences = 0, [], []
    names = ("units", "tens", "hundreds")
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        carried = f"{operation}1" if carry else ""
        if operation == "+":
            value = x + y + carry
            carry, digit = value // 10, value % 10
        else:
            value = x - y - carry
            carry = int(value < 0)
            x, value = x + 10 * carry, value + 10 * carry
            digit = value
        columns.append(f"{x}{operation}{y}{carried}={value}")
        verb = "carry" if operation == "+" else "borrow"
        sentences.append(f"{names[place]}: {columns[-1]}, write {digit}, {verb} {carry}.")
    result = a + b if operation == "+" else a - b
    if effort == "low":
        return "; ".join(columns) + "."
    lines = ["; ".join(columns) + "."] if effort == "medium" else sentences
    return "\n".join([*lines, f"The result is {result}."])
