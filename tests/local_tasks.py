"""Two tasks for lm-evaluation-harness in a folder: choices and answers, from data beside them."""

import json
from pathlib import Path

CHOICE, ANSWER = "local_choice", "local_answer"
EXAMPLES = "Question: What is the capital of Italy?\\nAnswer: Rome\\n\\n"
CAPITALS = {"France": "Paris", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo"}
SETTINGS = {
    CHOICE: 'multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n',
    ANSWER: 'generate_until\ndoc_to_target: "{{target}}"\nmetric_list: [{metric: exact_match}]\n'
    'generation_kwargs: {until: ["\\n", "."], max_gen_toks: 24}\n',
}


def write_tasks(folder: Path) -> Path:
    """Nothing of them is fetched."""
    folder.mkdir(exist_ok=True)
    for task, settings in SETTINGS.items():
        (folder / f"{task}.yaml").write_text(
            f"task: {task}\ntest_split: test\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/{task}.jsonl}}}}\n"
            f'doc_to_text: "{EXAMPLES}Question: {{{{question}}}}\\nAnswer:"\n'
            f"output_type: {settings}"
        )
    choices, answers = [], []
    for place, (country, capital) in enumerate(CAPITALS.items()):
        question = f"What is the capital of {country}?"
        others = [city for city in CAPITALS.values() if city != capital]
        options = [*others[:place], f"{capital} is the capital", *others[place:]]
        choices.append({"question": question, "choices": options, "answer": place})
        answers.append({"question": question, "target": f"The capital of {country} is {capital}"})
    for task, items in ((CHOICE, choices), (ANSWER, answers)):
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


def requests(folder: Path, name: str) -> list[object]:
    """What the harness asks of a model."""
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_path=folder, include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    return list(task.instances)
