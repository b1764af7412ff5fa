"""Reward actors that misbehave, and what a sweep asks, in a module that Ray's workers can import."""

import os

import ray

from diffinstruct.cluster.reward_actor import RewardActor
from diffinstruct.reward_service import client, reward_validation


class Strange(RewardActor):
    """Dies when a prompt says "die"; else its first three answers are to another call, for too few samples, and with
    the names in another order."""

    answered = 0

    def score(self, request, latents, prompts, terms):
        if "die" in prompts:
            os._exit(1)
        answer = super().score(request, latents, prompts, terms)
        self.answered += 1
        match self.answered:
            case 1:
                return answer._replace(request="another")
            case 2:
                return super().score(request, latents[:-1], prompts[:-1], terms)
            case 3:
                return answer._replace(rewards=answer.rewards[::-1])
        return answer


class Polite(RewardActor):
    """Counts its validations: each report tells how many there have been."""

    validations = 0

    def validate(self, *question):
        def counted(name, reward, images, prompts, trained, known):
            self.validations += 1
            return reward_validation.Report(name, (f"validation {self.validations}, {len(images)} images, trained {trained}",))

        client.validate_reward = counted
        return super().validate(*question)


def whereabouts(experiment, folder):
    """What a sweep may ask of each finished run: the beginning of the id of the node where it is asked."""
    return {"examined_on": int(ray.get_runtime_context().get_node_id()[:8], 16)}
