"""What RecoveryHook promises: the network computes the same, bit for bit, until a filter opens.

Also in evaluation, in an average of it and in a teacher, whatever is made of the filters.
"""

from __future__ import annotations

import copy
import uuid

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from promise_networks import NETWORKS, build
from torch.utils.data import Dataset

import psbn_mmdet  # noqa: F401

STEPS = 60

pytestmark = pytest.mark.slow


class Still(torch.optim.SGD):
    """Has a learning rate, and changes nothing: all that moves is moved by the hook."""

    def step(self, closure=None):
        pass


class Nothing(Dataset):
    METAINFO = {}

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        return 0


class StudentAndTeacher(BaseModel):
    def __init__(self, net, alone):
        super().__init__()
        self.student = net
        if not alone:
            self.teacher = copy.deepcopy(net).requires_grad_(False)

    def forward(self, batch, mode='loss'):
        if hasattr(self, 'teacher'):
            with torch.no_grad():
                self.teacher(self.student.x)
        self.out = self.student(self.student.x)
        return dict(loss=self.out.square().sum())


class Compare(Hook):
    """The outputs after each step: of the network in training and evaluation, and of its copies."""

    priority = 'LOWEST'

    def before_train(self, runner):
        model, self.networks = runner.model, {}
        if hasattr(model, 'teacher'):
            ema = next(h for h in runner.hooks if hasattr(h, 'ema_model')).ema_model.module
            self.networks = dict(student=model.student, teacher=model.teacher, average=ema.student)
        self.first, self.differ, self.opened = {}, [], {}
        self.look(0)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model, step = runner.model, runner.iter + 1
        if not hasattr(model.student, 'steps'):  # which vary by themselves
            self.note('student, in its step', model.out.detach(), model.student.is_open, step)
        self.look(step)

    @torch.no_grad()
    def look(self, step):
        for name, network in self.networks.items():
            for training in (True, False):
                kind = f'{name}, {"training" if training else "evaluation"}'
                one = copy.deepcopy(network).train(training)
                one.steps = 2  # of those that take different ways
                self.note(kind, one(network.x), one.is_open, step)

    def note(self, kind, out, is_open, step):
        if is_open:
            self.opened.setdefault(kind, step)
        first = self.first.setdefault(kind, out)
        if kind not in self.opened and not torch.equal(out, first):
            self.differ.append((step, kind, (out - first).abs().max().item()))


def watched(net, work_dir):
    # torch copies no module with a weight that is computed.
    alone = any(isinstance(vars(m).get('weight'), torch.Tensor) for m in net.modules())
    compare = Compare()
    average = [
        dict(type='EMAHook', momentum=0.5),
        dict(type='mmdet.MeanTeacherHook', momentum=0.5),
    ]
    model = StudentAndTeacher(net, alone)
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=1, dataset=Nothing(), sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=OptimWrapper(Still(model.parameters(), lr=1.0)),
        default_hooks=dict(logger=None, checkpoint=None, timer=None),
        custom_hooks=[
            *(average if not alone else []),
            dict(type='RecoveryHook', steps=20, window=3),
            compare,
        ],
        log_level='WARNING',
        experiment_name=f'promise_{uuid.uuid4().hex}',
    )
    runner.train()
    return compare


@pytest.mark.parametrize('name', NETWORKS)
def test_outputs_are_the_same_until_a_filter_opens(name, tmp_path, caplog):
    net, opens = build(name)
    compare = watched(net, tmp_path)
    assert not compare.differ
    if opens:
        assert compare.opened.keys() >= {'student, in its step'}
    # The copies follow, and do not go ahead.
    when = compare.opened.get('student, evaluation', STEPS)
    for copy_of in ('average', 'teacher'):
        assert compare.opened.get(f'{copy_of}, evaluation', STEPS) >= when
    assert not any('off from iteration' in text for text in caplog.messages)


def test_there_are_enough_of_them_and_the_comparison_would_tell(tmp_path, monkeypatch):
    assert len(NETWORKS) >= 60 and sum(opens for _, _, opens, _ in NETWORKS.values()) >= 40
    monkeypatch.setattr('psbn_mmdet.recovery.recovery._Layer._most_of', lambda x, _: x.index * 0.0)
    monkeypatch.setattr('psbn_mmdet.collapse.structure._rectifier', lambda *_: 'relu')
    net, _ = build('not rectified by, abs')
    net.last.weight.register_hook(torch.zeros_like)
    net.bn.bias.register_hook(torch.zeros_like)  # as if no gradient came
    assert watched(net, tmp_path).differ
