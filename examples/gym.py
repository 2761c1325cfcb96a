r"""A task of the package reasoning-gym, which draws problems of a hundred kinds: pip install reasoning-gym

    State the final answer to the following arithmetic problem: 47 - 21 =        \boxed{26}

Another kind is another name and other parameters of create_dataset. There are no worked solutions, so a
demonstration is the answer alone; a few kinds, such as graph_color, have no answer either. The scorer of
prime_factorization raises ValueError for text that is no number: catch it there.

    python bridge.py --preset smollm2 --task examples/gym.py:gym
"""

import json

import reasoning_gym

from rewards import extract
from tasks.task import Demonstration, Problem, Task


def gym(s) -> Task:
    """100 evaluation problems, 256 demonstrations, and about 800 problems: those that are drawn twice count once."""
    data = reasoning_gym.create_dataset("chain_sum", size=1200, seed=s.seed, max_terms=2, min_digits=2, max_digits=2)

    def solves(response: str, problem: Problem) -> bool:
        if not problem.extra:
            raise ValueError("--ask takes only questions that the task has drawn: others have no entry to grade by")
        # A scorer may pay a part: an answer that is not quite right counts as wrong.
        return data.score_answer(extract(response), problem.extra) == 1.0

    # Metadata may have tuples, which a result file turns into lists: the verifier reads lists from the start.
    entries = [json.loads(json.dumps(entry)) for entry in data]
    problems = [Problem(e["question"], e["answer"], extra=e) for e in {e["question"]: e for e in entries}.values()]
    worked = [Demonstration(p.question, f"\\boxed{{{p.answer}}}", p.answer, p.extra) for p in problems[-256:]]
    return Task(problems[100:-256], worked, problems[:100], verifier=solves)
