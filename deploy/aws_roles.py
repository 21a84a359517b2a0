"""Makes the instance profiles that cluster.yaml names, once for an account; again with other buckets changes those.

python deploy/aws_roles.py BUCKET …     needs boto3, and credentials that may do this

``ldm-ray-worker`` may read and write the buckets. ``ldm-ray-head`` may that too, and start and end machines as Ray's
own default profile does, find their image, and hand them the worker's role.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import boto3

HEAD, WORKER = "ldm-ray-head", "ldm-ray-worker"
IMAGES = "arn:aws:ssm:*:*:parameter/aws/service/deeplearning/*"
TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def allow(actions: list[str], *resources: str) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": actions, "Resource": list(resources)}


def store(buckets: list[str]) -> list[dict[str, Any]]:
    """What reading and writing runs in the buckets needs."""
    names = [f"arn:aws:s3:::{bucket}" for bucket in buckets]
    objects = [f"{name}/*" for name in names]
    return [
        allow(["s3:ListBucket", "s3:GetBucketLocation"], *names),
        allow(["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"], *objects),
    ]


def make(iam: Any, name: str, statements: list[dict[str, Any]]) -> str:
    """A role with these rights and an instance profile of the same name; the role's ARN."""
    present_already = contextlib.suppress(iam.exceptions.EntityAlreadyExistsException)
    with present_already:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(TRUST))
    policy = {"Version": "2012-10-17", "Statement": statements}
    iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
    with present_already:
        iam.create_instance_profile(InstanceProfileName=name)
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return str(iam.get_role(RoleName=name)["Role"]["Arn"])


def main(buckets: list[str]) -> None:
    if not buckets or any(bucket.startswith("-") or ":" in bucket or "/" in bucket for bucket in buckets):
        sys.exit("name the buckets, without s3://: python deploy/aws_roles.py BUCKET …")
    iam = boto3.client("iam")
    worker = make(iam, WORKER, store(buckets))
    rights = [*store(buckets), allow(["iam:PassRole"], worker), allow(["ssm:GetParameters"], IMAGES)]
    make(iam, HEAD, rights)
    iam.attach_role_policy(RoleName=HEAD, PolicyArn="arn:aws:iam::aws:policy/AmazonEC2FullAccess")
    print(f"instance profiles {HEAD} and {WORKER} for {', '.join(buckets)}")


if __name__ == "__main__":
    main(sys.argv[1:])
