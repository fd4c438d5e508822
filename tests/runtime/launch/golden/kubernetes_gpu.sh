# manifests and code
mkdir -p runs/n.launch
cat > runs/n.launch/jobset.yaml <<'END_OF_FILE'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: n
spec:
  network:
    enableDNSHostnames: true
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        backoffLimit: 0
        completionMode: Indexed
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            containers:
            - name: run
              image: registry/jmeta:1
              command:
              - sh
              - -c
              - cd "$$(mktemp -d)" && tar -xzf /runs/n.code.tar.gz || exit 1; if [ "$${JMETA_RESTART_ATTEMPT:-0}" -gt 0 ]; then set -- "$$@" --resume; fi; exec "$$@"
              - run
              - python
              - -u
              - -m
              - experiments.reviews
              - --preset
              - full
              - --out
              - /runs/n
              env:
              - name: JMETA_RESTART_ATTEMPT
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['jobset.sigs.k8s.io/restart-attempt']
              resources:
                limits:
                  nvidia.com/gpu: 8
              volumeMounts:
              - name: runs
                mountPath: /runs
            nodeSelector:
              cloud.google.com/gke-accelerator: nvidia-h100-80gb
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: runs
        completions: 2
        parallelism: 2
  failurePolicy:
    maxRestarts: 10
END_OF_FILE
cat > runs/n.launch/files.yaml <<'END_OF_FILE'
apiVersion: v1
kind: Pod
metadata:
  name: n-files
spec:
  restartPolicy: Never
  activeDeadlineSeconds: 3600
  containers:
  - name: files
    image: registry/jmeta:1
    command:
    - sleep
    - '3600'
    volumeMounts:
    - name: runs
      mountPath: /runs
  volumes:
  - name: runs
    persistentVolumeClaim:
      claimName: runs
END_OF_FILE
git archive --format=tar.gz --output=runs/n.launch/code.tar.gz HEAD

# the code onto the claim
kubectl delete pod n-files --ignore-not-found --grace-period=1 --namespace=ml
kubectl create --filename=runs/n.launch/files.yaml --namespace=ml
kubectl wait --for=condition=Ready pod/n-files --timeout=300s --namespace=ml
kubectl exec n-files --namespace=ml -- sh -c 'ls -A /runs/n | head -n 1'
kubectl cp runs/n.launch/code.tar.gz n-files:/runs/n.code.tar.gz --namespace=ml
kubectl delete pod n-files --ignore-not-found --grace-period=1 --namespace=ml

# create it
kubectl create --filename=runs/n.launch/jobset.yaml --namespace=ml

# every 15 s until it is Completed or Failed; the cluster restarts it at most 10 times
kubectl get jobset n --output=json --namespace=ml
kubectl get pods --selector=jobset.sigs.k8s.io/jobset-name=n --output=json --namespace=ml
kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=n,batch.kubernetes.io/job-completion-index=0 --tail=-1 --timestamps --namespace=ml

# at the end: the run directory
kubectl delete pod n-files --ignore-not-found --grace-period=1 --namespace=ml
kubectl create --filename=runs/n.launch/files.yaml --namespace=ml
kubectl wait --for=condition=Ready pod/n-files --timeout=300s --namespace=ml
rm -rf runs/n.new runs/n.old
mkdir -p runs/n.new runs/n
kubectl cp n-files:/runs/n runs/n.new --namespace=ml
mv runs/n runs/n.old
mv runs/n.new runs/n
rm -rf runs/n.old
kubectl delete pod n-files --ignore-not-found --grace-period=1 --namespace=ml

# at the end, however it comes
kubectl delete jobset n --ignore-not-found --namespace=ml
kubectl delete secret n-env --ignore-not-found --namespace=ml
kubectl delete pod n-files --ignore-not-found --grace-period=1 --namespace=ml
