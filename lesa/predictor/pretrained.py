"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of a predictor, as of other models on the Hub."""

from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from lesa.files.hub import LIBRARY, local_folder
from lesa.predictor import model_card, saving
from lesa.predictor.description import Description
from lesa.predictor.model_card import Report


class Pretrained(ModelHubMixin, library_name=LIBRARY, tags=["lesa", "diffusion", "feature-caching", "acceleration"]):
    """A module that is saved and loaded. It has to have :meth:`describe` and :meth:`restore`."""

    def describe(self) -> Description:
        """All of it but the weights."""
        raise NotImplementedError

    @classmethod
    def restore(cls, description: Description, weights: dict[str, Tensor]) -> Self:
        """The module with this description and these weights."""
        raise NotImplementedError

    def save_pretrained(
        self, save_directory: str | Path, *, report: Report | None = None, **options: Any
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a ``README.md`` that describes the predictor.

        Args:
            save_directory: the folder.
            report: rows as ``lesa demo`` writes them, or the file that holds them, for the README.md.
            options: those of :meth:`huggingface_hub.ModelHubMixin.save_pretrained`.

        Raises:
            ValueError: if the report is not a list of rows; nothing is written then.
            OSError: that names the file, if one cannot be written; an older predictor or this one is there then.
        """
        directory = Path(save_directory)
        described = {"report": report} | (options.pop("model_card_kwargs", None) or {})
        card = self.generate_model_card(**described)
        options.pop("config", None)  # ours is written
        push, repository = options.pop("push_to_hub", False), options.pop("repo_id", None) or directory.name
        self._save_pretrained(directory)
        model_card.write(card, directory)
        return self.push_to_hub(repository, model_card_kwargs=described, **options) if push else None

    def push_to_hub(self, repo_id: str, *, report: Report | None = None, **options: Any) -> str:
        """:meth:`save_pretrained` into a repository of the Hugging Face Hub, which is made if there is none.

        Args:
            repo_id: such as ``"user/repo"``.
            report, options: as for :meth:`save_pretrained`.
        """
        described = {"report": report, "name": repo_id} | (options.pop("model_card_kwargs", None) or {})
        return super().push_to_hub(repo_id, model_card_kwargs=described, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        saving.write(save_directory, self.state_dict(), self.describe())

    def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
        """The README.md; ``options`` are those of :func:`lesa.predictor.model_card.describe`."""
        header = self._hub_mixin_info.model_card_data.to_yaml()
        assert isinstance(self, nn.Module)
        parameters = sum(p.numel() for p in self.parameters())
        return ModelCard(f"---\n{header}\n---\n\n{model_card.describe(self.describe(), parameters, *args, **options)}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Read what :meth:`save_pretrained` wrote or ``push_to_hub`` published.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hugging Face Hub where there is no folder of
                that name.
            options: ``revision``, ``token``, ``cache_dir``, ``force_download`` and ``local_files_only``, of a
                repository.

        Raises:
            FileNotFoundError: if it holds no predictor.
            ValueError: if a file is damaged or the weights belong to another configuration or predictor.
        """
        return cls.restore(*saving.read(local_folder(pretrained_model_name_or_path, **options)))
