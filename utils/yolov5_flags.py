"""The flags of YOLOv5's scripts. An abbreviation means here what it means there; what is left out is named."""
from __future__ import annotations

# Script -> its flags, as of August 2026. `python bench/flags.py --stock yolov5` compares them with a checkout.
FLAGS = {script: tuple(flags.split()) for script, flags in {
    "train.py":
        "--weights --cfg --data --hyp --epochs --batch-size --imgsz --img --img-size --rect --resume --nosave --noval "
        "--noautoanchor --noplots --evolve --evolve_population --resume_evolve --bucket --cache --image-weights "
        "--device --multi-scale --single-cls --optimizer --sync-bn --workers --project --name --exist-ok --quad "
        "--cos-lr --label-smoothing --patience --freeze --save-period --seed --local_rank --entity --upload_dataset "
        "--bbox_interval",
    "val.py":
        "--data --weights --batch-size --imgsz --img --img-size --conf-thres --iou-thres --max-det --task --device "
        "--workers --single-cls --augment --verbose --save-txt --save-hybrid --save-conf --save-json --project --name "
        "--exist-ok --half --dnn",
    "detect.py":
        "--weights --source --data --imgsz --img --img-size --conf-thres --iou-thres --max-det --device --view-img "
        "--save-txt --save-format --save-csv --save-conf --save-crop --nosave --classes --agnostic-nms --augment "
        "--update --project --name --exist-ok --line-thickness --hide-labels --hide-conf --half --dnn --vid-stride",
    "export.py":
        "--data --weights --imgsz --img --img-size --batch-size --device --half --inplace --keras --optimize --int8 "
        "--per-tensor --dynamic --cache --simplify --mlmodel --opset --verbose --workspace --nms --agnostic-nms "
        "--topk-per-class --topk-all --iou-thres --conf-thres --include",
    "benchmarks.py":
        "--weights --imgsz --img --img-size --batch-size --data --device --half --test --pt-only --hard-fail"}.items()}

# Formats of --include that YOLOv5's export.py has and this one has not -> what to give for them.
_AGAIN = "yolov5, and the .pt that it writes to YOLOv5's own export.py"
INSTEAD = {**dict.fromkeys(("saved_model", "pb", "tflite", "edgetpu", "tfjs", "paddle"), _AGAIN),
           "engine": "onnx, and the file to trtexec --onnx", "coreml": "torchscript, and the file to coremltools"}

# Those that no script here has, or not that one -> what to do instead, as (English, Chinese).
LEFT_OUT = {flag: why for flags, why in {
    "--evolve --evolve_population --resume_evolve":
        ("no evolution; data/hyps has sets of hyper-parameters, --hyp takes yours",
         "没有超参数进化；data/hyps 中有多组超参数，--hyp 也接受自己的文件"),
    "--entity --upload_dataset --bbox_interval":
        ("no W&B; results.csv and TensorBoard have the figures", "没有 W&B；指标在 results.csv 和 TensorBoard 中"),
    "--bucket": ("no Google Cloud; copy the run's folder", "不支持 Google Cloud；请复制运行文件夹"),
    "--quad": ("no quad loader; --multi-scale trains at several sizes", "没有 quad 加载器；多尺度训练用 --multi-scale"),
    "--local_rank": ("torchrun tells the processes which they are", "torchrun 会自行告知各进程编号"),
    "--save-hybrid": ("labels and predictions are not mixed; --save-txt writes predictions",
                      "不混合标签与预测；--save-txt 写出预测"),
    "--dnn": ("onnxruntime runs .onnx files", ".onnx 文件由 onnxruntime 运行"),
    "--data": ("the weights know the names", "类别名称来自权重"),
    "--update": ("checkpoints need none", "权重文件不需要更新"),
    "--inplace": ("nothing depends on it", "没有作用"),
    "--keras --per-tensor --agnostic-nms --topk-per-class --topk-all --iou-thres --conf-thres":
        ("TensorFlow: --include yolov5, then YOLOv5's export.py",
         "TensorFlow：先用 --include yolov5，再用 YOLOv5 的 export.py"),
    "--mlmodel": ("Core ML: --include yolov5, then YOLOv5's export.py",
                  "Core ML：先用 --include yolov5，再用 YOLOv5 的 export.py"),
    "--optimize": ("for phones: --include ncnn", "手机上请用 --include ncnn"),
    "--cache --workspace --verbose":
        ("TensorRT: --include onnx, then trtexec", "TensorRT：先用 --include onnx，再用 trtexec"),
    "--test": ("--noval measures size and time only", "--noval 只测大小和耗时"),
    "--pt-only": ("--include torch", "--include torch"),
}.items() for flag in flags.split()}
